"""The model that is trained: Megatron-Core's GPTModel built, loaded, updated, saved and exported."""
