"""Matrix products as the whole model takes them."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_fp8 import BlockScaledFp8, Weight, dequantise


def precision_for(*arrays: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST where an operand is float32, else None.

    On Hopper the default for float32 is TF32, which has 10 bits of mantissa. Products of bfloat16
    are exact in float32 anyway.
    """
    wide = any(array.dtype == jnp.float32 for array in arrays)
    return jax.lax.Precision.HIGHEST if wide else None


def einsum(subscripts: str, x: jax.Array, weight: Weight) -> jax.Array:
    """jnp.einsum that accumulates in float32 and returns float32.

    A BlockScaledFp8 weight is dequantised to x's dtype: value x scale in float32, rounded once.
    """
    if isinstance(weight, BlockScaledFp8):
        weight = dequantise(weight, x.dtype)
    return jnp.einsum(
        subscripts,
        x,
        weight,
        precision=precision_for(x, weight),
        preferred_element_type=jnp.float32,
    )
