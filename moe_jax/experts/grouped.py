"""Grouped matmul: assignments sorted by expert, each expert's rows multiplied together.

This backend is for prefill and training. lax.ragged_dot_general contracts the weights' last
dimension, so it reads them as they are stored. XLA expands it to a dense product of all experts, on
CPUs and GPUs alike, with zeros in the rows of other experts. So weights must be finite, because an
inf or NaN in any expert reaches every token.
"""

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.products import precision_for
from pallas_kernels.decode_experts import ExpertWeights

# rows [R, in] x weights [E, out, in] -> [R, out], the rows of each group with its expert.
ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def grouped_experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str = "silu",
) -> jax.Array:
    """Sorts, multiplies twice, restores the order, adds a token's K outputs. Has gradients.

    Arguments and result as in portable_experts.
    """
    E, _, I, H = weights.gate_up.shape
    T, K = ids.shape
    flat = jnp.where((ids >= 0) & (ids < E), ids, E).reshape(-1)  # [TK]; padding sorts last
    order = jnp.argsort(flat)
    inside = (flat[order] < E)[:, None]
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

    # Rows of padding are in no group, so their products are undefined: they are selected away, and
    # before the product too, because a gradient would be NaN otherwise.
    rows = jnp.where(inside, x[order // K], 0)
    projected = _product(rows, weights.gate_up.reshape(E, 2 * I, H), group_sizes)
    projected = jnp.where(inside, projected, 0)
    hidden = ACTIVATIONS[activation](projected[:, :I]) * projected[:, I:]  # [TK, I]
    outputs = _product(hidden.astype(x.dtype), weights.down, group_sizes)
    outputs = jnp.where(inside, outputs, 0)[jnp.argsort(order)].reshape(T, K, H)
    # The routing weight of padding may be anything, inf and NaN too.
    safe_weights = jnp.where(flat.reshape(T, K) < E, expert_weights, 0)
    return jnp.sum(safe_weights[..., None] * outputs, axis=1).astype(x.dtype)


def _product(rows: jax.Array, stored: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(
        rows,
        stored,
        group_sizes,
        ROWS_BY_EXPERT,
        precision=precision_for(rows, stored),
        preferred_element_type=jnp.float32,
    )
