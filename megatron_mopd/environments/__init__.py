"""Several turns with a tool or an agent environment in between, over any rollout engine."""
