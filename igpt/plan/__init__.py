"""Plans: what a training run would need on machines that are not attached."""
