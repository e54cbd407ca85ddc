"""Answers to prompts, with the log-probabilities they were sampled with."""
