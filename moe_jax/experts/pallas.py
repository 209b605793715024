"""The decode kernels as a backend: pallas_kernels forward, the portable form's gradients."""

import functools

import jax

from moe_jax.experts.portable import portable_experts
from pallas_kernels.decode_experts import ExpertWeights, decode_experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def pallas_experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str = "silu",
    interpret: bool = False,
) -> jax.Array:
    """The op in the layout that pallas_kernels' choose_layout picks for this T.

    The kernels have no gradient. The gradient of this function is that of portable_experts at the
    same inputs, at the cost of that function's forward and backward pass.

    Arguments and result as in portable_experts, bfloat16 only.

    Args:
      activation: silu, which the kernels have built in.
      interpret: whether to run in Pallas's interpret mode.
    """
    del activation  # the backends declare which
    return decode_experts(x, weights, ids, expert_weights, interpret=interpret)


def _forward(x, weights, ids, expert_weights, activation, interpret):
    y = pallas_experts(x, weights, ids, expert_weights, activation, interpret)
    return y, (x, weights, ids, expert_weights)


def _backward(activation, interpret, saved, cotangent):
    del interpret
    x, weights, ids, expert_weights = saved

    def portable(x, weights, expert_weights):
        return portable_experts(x, weights, ids, expert_weights, activation)

    _, pull = jax.vjp(portable, x, weights, expert_weights)
    of_x, of_weights, of_expert_weights = pull(cotangent)
    return of_x, of_weights, None, of_expert_weights


pallas_experts.defvjp(_forward, _backward)
