"""Checkpoints and adapters in folders: where they are, whether they are whole, what they say."""
