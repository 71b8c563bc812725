"""A chain of denoising steps and the gradient through it, for every kind of generator."""
