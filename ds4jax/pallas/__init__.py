"""Pallas GPU kernels under the names and signatures of `ds4jax.ops`; there are none yet."""
