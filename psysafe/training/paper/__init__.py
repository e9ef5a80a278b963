"""The step on paper: the real training step, and generation, executed without memory, arithmetic or a GPU."""
