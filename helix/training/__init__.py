"""The one training loop, its optimiser, metrics and checkpoints; with or without Ray."""
