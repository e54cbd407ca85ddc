"""Runs inside the sandbox: scripts of the standard library alone."""
