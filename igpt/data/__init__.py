"""Where examples come from, and how images become batches of tokens."""
