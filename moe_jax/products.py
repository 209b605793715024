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
    weight = _plain(weight, x.dtype)
    return jnp.einsum(
        subscripts,
        x,
        weight,
        precision=precision_for(x, weight),
        preferred_element_type=jnp.float32,
    )


def linear_product(x: jax.Array, weight: Weight) -> jax.Array:
    """Multiplies x [..., in] with weight [out, in], as einsum does; the caller rounds to x's dtype.

    So the cotangent has values of x's dtype, and is wider only because the rounding widens it. The
    gradient narrows it again, which changes none. Otherwise XLA would widen the weight as well, and
    multiply in float32 or TF32: twice the time and a copy of the weight.
    """
    return _product(x, _plain(weight, x.dtype))


def _plain(weight: Weight, dtype) -> jax.Array:
    return dequantise(weight, dtype) if isinstance(weight, BlockScaledFp8) else weight


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum("...i,oi->...o", x, weight)


def _forward(x, weight):
    return _product(x, weight), (x, weight)


def _backward(operands, cotangent):
    x, weight = operands
    cotangent = cotangent.astype(x.dtype)
    of_x = einsum("...o,oi->...i", cotangent, weight)
    rows = tuple(range(x.ndim - 1))
    of_weight = jnp.tensordot(
        cotangent,
        x,
        axes=(rows, rows),
        precision=precision_for(x),
        preferred_element_type=jnp.float32,
    )
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype)


_product.defvjp(_forward, _backward)
