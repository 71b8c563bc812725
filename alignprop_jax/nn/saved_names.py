"""What `jax.ad_checkpoint.checkpoint_name` calls the results that are much work for their size.

Networks that are evaluated again in the backward pass had better have kept them.
"""

ATTENTION = "attention"
"""Outputs of attention, and the sums that its gradient needs."""
CONVOLUTION = "convolution"
ALL = (ATTENTION, CONVOLUTION)
