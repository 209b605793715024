"""Each assignment's expert is gathered and multiplied: the simplest fast path for few tokens."""

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.products import einsum
from pallas_kernels.decode_experts import ExpertWeights


def gather_experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str = "silu",
) -> jax.Array:
    """Reads the weights of T * K experts, shared or not.

    Args:
      x: [T, H].
      weights: gate_up [E, 2, I, H], down [E, H, I].
      ids: [T, K] int32; an id outside [0, E) is padding.
      expert_weights: [T, K] float32.
      activation: a name in ACTIVATIONS.

    Returns:
      [T, H] in x's dtype: products of x's dtype summed in float32, the intermediate in x's dtype.
    """
    inside = (ids >= 0) & (ids < weights.gate_up.shape[0])  # [T, K]
    safe = jnp.where(inside, ids, 0)
    # Selected before the products too: NaN in a padded row must not reach the weights' gradients.
    x = jnp.where(jnp.any(inside, axis=1, keepdims=True), x, 0)
    expert_weights = jnp.where(inside, expert_weights, 0)
    projected = einsum("th,tkjih->tkji", x, weights.gate_up[safe])
    hidden = ACTIVATIONS[activation](projected[:, :, 0]) * projected[:, :, 1]  # [T, K, I]
    outputs = einsum("tki,tkhi->tkh", hidden.astype(x.dtype), weights.down[safe])
    # Select, never multiply by zero: x or an expert that is not asked for may hold inf.
    weighted = jnp.where(inside[..., None], expert_weights[..., None] * outputs, 0)
    return jnp.sum(weighted, axis=1).astype(x.dtype)
