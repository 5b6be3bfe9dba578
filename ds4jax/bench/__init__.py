"""Measurements: device time of kernels and of decoding, on the shapes of the full model."""
