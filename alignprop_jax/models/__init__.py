"""Flax (linen) modules of Stable Diffusion and CLIP, in NHWC layout.

Submodules carry the names of the PyTorch state dicts, dots included (`down_blocks.0`, `to_out.0`),
so that the path of a parameter joined by dots is the name of its tensor in a diffusers or
transformers file.
"""
