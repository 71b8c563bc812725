"""Tuning of text-to-image diffusion models by backpropagating a reward through the sampler."""

__version__ = "0.1.0"
