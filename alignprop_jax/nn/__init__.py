"""Layers, attention and its kernels, convolution, and networks that several models share."""
