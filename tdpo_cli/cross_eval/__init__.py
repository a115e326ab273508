"""`tdpo cross-eval`: base model and checkpoints on the same held-out prompts and noise."""
