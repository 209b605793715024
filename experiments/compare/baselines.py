"""What plain XLA makes of the layer, written in three ways, and the usual kernels' rounding.

Each takes x [T, H] bf16, the weights, expert_ids [T, K] and expert_weights [T, K] float32, all ids
in [0, E), and returns [T, H] in `out_dtype`. Products take bf16 and accumulate in float32; the
intermediate is cast to bf16 for the second product. XLA may drop that cast where it fuses the
product: on a GPU xla_gather's error shows that it does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.experts.grouped import ROWS_BY_EXPERT
from pallas_kernels.decode_experts import ExpertWeights

Layer = Callable[[jax.Array, ExpertWeights, jax.Array, jax.Array], jax.Array]


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, cast to the bf16 that the next product takes."""
    return (jax.nn.silu(gate) * up).astype(jnp.bfloat16)


def xla_gather(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """Gathers the weights of each assignment's expert; asks for T * K experts' bytes."""
    gate_up = weights.gate_up[expert_ids]  # [T, K, 2, I, H]
    projected = jnp.einsum("th,tkjih->tkji", x, gate_up, preferred_element_type=jnp.float32)
    hidden = _swiglu(projected[:, :, 0], projected[:, :, 1])  # [T, K, I]
    down = weights.down[expert_ids]  # [T, K, H, I]
    outputs = jnp.einsum("tki,tkhi->tkh", hidden, down, preferred_element_type=jnp.float32)
    return jnp.sum(expert_weights[..., None] * outputs, axis=1).astype(out_dtype)


def grouped_matmul_layer(ragged_dot, x, weights, expert_ids, expert_weights, *, out_dtype):
    """Sorts the assignments by expert, two grouped products, back into order, combine.

    ragged_dot(rows [TK, in], weights [E, out, in], group_sizes [E]) -> [TK, out] float32.
    """
    E, _, I, H = weights.gate_up.shape
    T, K = expert_ids.shape
    flat = expert_ids.reshape(-1)  # [TK]
    order = jnp.argsort(flat)
    group_sizes = jnp.bincount(flat, length=E).astype(jnp.int32)
    projected = ragged_dot(x[order // K], weights.gate_up.reshape(E, 2 * I, H), group_sizes)
    hidden = _swiglu(projected[:, :I], projected[:, I:])  # [TK, I]
    outputs = ragged_dot(hidden, weights.down, group_sizes)  # [TK, H]
    in_order = outputs[jnp.argsort(order)].reshape(T, K, H)
    return jnp.sum(expert_weights[..., None] * in_order, axis=1).astype(out_dtype)


def xla_ragged(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """jax.lax.ragged_dot_general. On a GPU it may be a dense product over all experts: look."""

    def ragged_dot(rows, stored, group_sizes):
        return jax.lax.ragged_dot_general(
            rows, stored, group_sizes, ROWS_BY_EXPERT, preferred_element_type=jnp.float32
        )

    return grouped_matmul_layer(
        ragged_dot, x, weights, expert_ids, expert_weights, out_dtype=out_dtype
    )


def xla_dense(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """Every expert on every token; what was not routed is dropped by a select."""
    E = weights.gate_up.shape[0]
    projected = jnp.einsum("th,ejih->teji", x, weights.gate_up, preferred_element_type=jnp.float32)
    hidden = _swiglu(projected[:, :, 0], projected[:, :, 1])  # [T, E, I]
    outputs = jnp.einsum("tei,ehi->teh", hidden, weights.down, preferred_element_type=jnp.float32)
    chosen = expert_ids[:, :, None] == jnp.arange(E, dtype=jnp.int32)  # [T, K, E]
    weight = jnp.sum(jnp.where(chosen, expert_weights[:, :, None], 0), axis=1)  # [T, E]
    routed = jnp.any(chosen, axis=1)[:, :, None]
    return jnp.sum(jnp.where(routed, weight[:, :, None] * outputs, 0), axis=1).astype(out_dtype)


def bf16_rounding(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """What the usual kernels round on the way: for its error only, never timed.

    bf16 after the first product, after silu(gate) * up and after each weighted expert output: the
    combine reads those bf16 outputs and adds them in float32. Its error of 0.004 is what vLLM's
    Triton kernels measure. One token at a time, to gather little.
    """

    def one_token(token):
        x_t, ids, w = token  # [H], [K], [K]
        projected = jnp.einsum(
            "h,kjih->kji", x_t, weights.gate_up[ids], preferred_element_type=jnp.float32
        )
        projected = _round_to_bf16(projected)
        hidden = _round_to_bf16(jax.nn.silu(projected[:, 0]) * projected[:, 1])  # [K, I]
        outputs = jnp.einsum("ki,khi->kh", hidden, weights.down[ids].astype(jnp.float32))
        return jnp.sum(_round_to_bf16(w[:, None] * outputs), axis=0)  # [H]

    return jax.lax.map(one_token, (x, expert_ids, expert_weights)).astype(out_dtype)


def _round_to_bf16(value: jax.Array) -> jax.Array:
    """float32 rounded to bf16's 8 bits; a pair of casts would be optimised away by XLA."""
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)


XLA_BASELINES: dict[str, Layer] = {
    "xla_gather": xla_gather,
    "xla_ragged": xla_ragged,
    "xla_dense": xla_dense,
    "bf16_rounding": bf16_rounding,
}

# Emulations, run for their error alone.
ACCURACY_ONLY = ("bf16_rounding",)
