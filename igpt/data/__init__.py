"""Data sources, and the conversion of their images to batches of tokens."""
