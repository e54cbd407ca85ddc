"""Frozen domain teachers that share the student's Megatron runtime."""
