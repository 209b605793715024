"""The small parts: linear, RMSNorm, embedding and the dense MLP, as functions and thin modules.

Weights are [out, in], as Hugging Face stores them, so that a checkpoint is copied and not turned.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.activations import ACTIVATIONS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.products import einsum


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Multiplies x [..., in] with weight [out, in] and adds bias [out]; rounds once."""
    y = einsum("...i,oi->...o", x, weight)
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
    """Rows of table [V, H] for ids [...].

    An id outside [0, V) gives NaN, as no error can be raised inside a compiled function.
    """
    inside = (ids >= 0) & (ids < table.shape[0])
    return jnp.where(inside[..., None], jnp.take(table, ids, axis=0, mode="clip"), jnp.nan)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, std: float, shape: tuple[int, ...], dtype) -> jax.Array:
    # Compiled, so that a large array is made in place on its device.
    return (jax.random.normal(key, shape, dtype) * std).astype(dtype)


def normal_param(
    config: Qwen3MoeConfig, rngs: nnx.Rngs, shape: tuple[int, ...], dtype
) -> nnx.Param:
    """A parameter drawn from a normal distribution of the config's initializer_range."""
    return nnx.Param(_normal(rngs.params(), config.initializer_range, shape, dtype))


class Linear(nnx.Module):
    """weight [N_out, N_in], bias [N_out] if asked for."""

    def __init__(self, config, N_in: int, N_out: int, *, rngs: nnx.Rngs, dtype, bias: bool = False):
        self.weight = normal_param(config, rngs, (N_out, N_in), dtype)
        self.bias = nnx.Param(jnp.zeros(N_out, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """weight [N]."""

    def __init__(self, config: Qwen3MoeConfig, N: int, *, dtype):
        self.weight = nnx.Param(jnp.ones(N, dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Embedding(nnx.Module):
    """weight [V, H]."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = normal_param(config, rngs, shape, dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return embed(ids, self.weight[...])


class MLP(nnx.Module):
    """down(activation(gate x) * up x), as wide as it is told: a dense layer, or shared experts."""

    def __init__(self, config: Qwen3MoeConfig, N: int, *, rngs: nnx.Rngs, dtype):
        H = config.hidden_size
        self.gate_proj = Linear(config, H, N, rngs=rngs, dtype=dtype)
        self.up_proj = Linear(config, H, N, rngs=rngs, dtype=dtype)
        self.down_proj = Linear(config, N, H, rngs=rngs, dtype=dtype)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.gate_proj(x)) * self.up_proj(x))
