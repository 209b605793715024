"""Pallas kernels for mixture-of-experts decoding: one folder an op. Knows JAX and no model."""
