"""Latent diffusion: the models together, the noise schedule, the sampler and its gradient."""
