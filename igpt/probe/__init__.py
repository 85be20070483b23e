"""Linear probes: features of every layer, and logistic regression on them."""
