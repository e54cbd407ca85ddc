"""What to run first on a node with GPUs: every path that only a GPU has, against its reference on the CPU."""
