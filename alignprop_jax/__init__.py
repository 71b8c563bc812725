"""Reward fine-tuning of text-to-image diffusion models by backpropagation through the sampler, in JAX."""

__version__ = "0.1.0"
