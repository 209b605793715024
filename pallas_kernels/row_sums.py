"""The sum of each token's rows, of whichever kernels computed one for each of its experts."""

import jax
import jax.numpy as jnp


def sum_rows(rows: jax.Array, row_of: jax.Array) -> jax.Array:
    """out[t] = sum over k, in order, of rows[row_of[t, k]]: [T, H] float32.

    Additions only: a product here could be fused into one of them, or not, by the size of T.

    Args:
      rows: [R, H] of any float dtype; rows that row_of does not name may hold anything.
      row_of: [T, K] int32; -1 adds nothing.
    """
    total = jnp.float32(0)
    for k in range(row_of.shape[1]):
        row = row_of[:, k, None]  # [T, 1]
        # Select, never multiply by zero: what lies at an unwritten row may be inf or NaN.
        total += jnp.where(row >= 0, rows[jnp.maximum(row[:, 0], 0)].astype(jnp.float32), 0)
    return total
