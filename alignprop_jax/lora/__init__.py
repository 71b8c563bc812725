"""Low-rank factors: the trainable tree, its files, and mixtures of two."""
