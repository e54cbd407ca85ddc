"""What `launch/*.sh` asks of Python: a job's facts, the check of a node, and torchrun that lets ranks save."""
