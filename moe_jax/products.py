"""Matrix products as the whole model takes them."""

import jax
import jax.numpy as jnp


def precision_for(*arrays: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST where an operand is float32, else None.

    On Hopper the default for float32 is TF32, which has 10 bits of mantissa. Products of bfloat16
    are exact in float32 anyway.
    """
    wide = any(array.dtype == jnp.float32 for array in arrays)
    return jax.lax.Precision.HIGHEST if wide else None


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum that accumulates in float32 and returns float32."""
    return jnp.einsum(
        subscripts, a, b, precision=precision_for(a, b), preferred_element_type=jnp.float32
    )
