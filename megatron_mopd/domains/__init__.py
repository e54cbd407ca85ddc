"""Prompts with verifiable answers: where they come from, how domains are mixed, how responses are scored."""
