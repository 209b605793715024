"""Portable XLA: what any XLA compiler should take, and what Ascend gets.

Only gathers along one axis, dots, reductions of one operand, comparisons, selects and elementwise
functions: no scatter, no sort, no loop. BlockScaledFp8 weights are dequantised to x's dtype, in the
gather form after the gather. Two forms, chosen by the static shape:

    T * K < E    gather   fetches the weights of each assignment's expert: T * K are read
    T * K >= E   dense    multiplies every token by every expert; unrouted ones are weighted with 0
"""

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.products import einsum
from pallas_kernels.decode_experts import ExpertWeights


def portable_experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str = "silu",
) -> jax.Array:
    """Gathers experts or multiplies all, depending on which reads less. Has gradients.

    Args:
      x: [T, H].
      weights: gate_up [E, 2, I, H], down [E, H, I]; in the dense form they must be finite, because
        an inf or NaN in any expert reaches every token.
      ids: [T, K] int32, as `experts` makes them; an id outside [0, E) is padding.
      expert_weights: [T, K] float32.
      activation: a name in ACTIVATIONS.

    Returns:
      [T, H] in x's dtype: products of x's dtype summed in float32, the intermediate in x's dtype.
    """
    E = weights.gate_up.shape[0]
    inside = (ids >= 0) & (ids < E)  # [T, K]
    # Selected before the products too: NaN in a padded row must not reach the weights' gradients.
    x = jnp.where(jnp.any(inside, axis=1, keepdims=True), x, 0)
    expert_weights = jnp.where(inside, expert_weights, 0)
    run = {"gather": _gather, "dense": _dense}[form_of(*ids.shape, E)]
    return run(x, weights, ids, expert_weights, ACTIVATIONS[activation]).astype(x.dtype)


def form_of(T: int, K: int, E: int) -> str:
    """The form that reads less, "gather" or "dense"."""
    return "gather" if T * K < E else "dense"


def _gather(x, weights: ExpertWeights, ids, expert_weights, activation) -> jax.Array:
    T, K = ids.shape
    inside = (ids >= 0) & (ids < weights.gate_up.shape[0])

    def routed(stored):  # [E, ...] -> [T, K, ...]
        taken = jnp.take(stored, ids.reshape(T * K), axis=0, mode="clip")
        return taken.reshape(T, K, *stored.shape[1:])

    gate_up, down = (jax.tree.map(routed, each) for each in (weights.gate_up, weights.down))
    projected = einsum("th,tkjih->tkji", x, gate_up)
    hidden = activation(projected[:, :, 0]) * projected[:, :, 1]  # [T, K, I]
    outputs = einsum("tki,tkhi->tkh", hidden.astype(x.dtype), down)
    # Select, never multiply by zero: x or an unrouted expert may hold inf.
    weighted = jnp.where(inside[..., None], expert_weights[..., None] * outputs, 0)
    return jnp.sum(weighted, axis=1)


def _dense(x, weights: ExpertWeights, ids, expert_weights, activation) -> jax.Array:
    """The routing weight multiplies the intermediate, so that one product adds up all experts."""
    E = weights.gate_up.shape[0]
    routed = ids[..., None] == jnp.arange(E, dtype=ids.dtype)  # [T, K, E]
    of_expert = jnp.sum(jnp.where(routed, expert_weights[..., None], 0), axis=1)  # [T, E]
    projected = einsum("th,ejih->teji", x, weights.gate_up)
    hidden = activation(projected[:, :, 0]) * projected[:, :, 1]  # [T, E, I]
    weighted = jnp.where(jnp.any(routed, axis=1)[..., None], of_expert[..., None] * hidden, 0)
    return einsum("tei,ehi->th", weighted.astype(x.dtype), weights.down)
