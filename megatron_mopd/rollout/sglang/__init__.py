"""Rollouts from SGLang servers: started or found, asked over HTTP, and given the student's weights."""
