"""The small parts as pure functions: linear, RMSNorm, embedding, the gated MLP.

Weights are [out, in], as Hugging Face stores them, so a checkpoint is copied and not transposed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.integers import at_least_int32
from moe_jax.products import linear_product
from pallas_kernels.block_scaled_fp8 import Weight


class LinearParams(NamedTuple):
    """weight [out, in], bias [out] or None."""

    weight: Weight
    bias: jax.Array | None = None


class MLPParams(NamedTuple):
    """gate_proj and up_proj [N, H], down_proj [H, N]; N is the MLP's width."""

    gate_proj: LinearParams
    up_proj: LinearParams
    down_proj: LinearParams


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """Multiplies x [..., in] with weight [out, in] and adds bias [out]; rounds once."""
    y = linear_product(x, weight)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Divides x [..., N] by its root mean square and multiplies with weight [N].

    The variance is float32; the weight multiplies after the cast back to x's dtype.
    """
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return weight * (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def embed(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of table [V, H] for ids [...] of any integer dtype.

    An id outside [0, V) gives NaN, because a compiled function cannot raise an error.
    """
    ids = at_least_int32(ids)
    inside = (ids >= 0) & (ids < table.shape[0])
    return jnp.where(inside[..., None], jnp.take(table, ids, axis=0, mode="clip"), jnp.nan)


def mlp(params: MLPParams, x: jax.Array, activation: str) -> jax.Array:
    """down(activation(gate x) * up x) of x [..., H]: a dense layer's MLP."""
    gate = ACTIVATIONS[activation](linear(x, *params.gate_proj))
    return linear(gate * linear(x, *params.up_proj), *params.down_proj)
