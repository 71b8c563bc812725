"""Tuning of text-to-image diffusion models by backpropagating a reward through the sampler."""

import sys

__version__ = "0.1.0"

# A program of the package starts, `python -m alignprop_jax.train`, whose imports take seconds.
if sys.argv[:1] == ["-m"] and any("alignprop_jax." in word for word in sys.orig_argv):
    from alignprop_jax.process import signals

    signals.handle()
