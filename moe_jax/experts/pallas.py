"""The decode kernels as a backend: pallas_kernels forward, another backend's gradients."""

import functools

import jax

from moe_jax.experts.grouped_pallas import grouped_pallas_experts
from moe_jax.experts.portable import portable_experts
from pallas_kernels.decode_experts import ExpertWeights, decode_experts
from pallas_kernels.grouped_matmul import SIZE_MULTIPLE, runs_on
from pallas_kernels.mosaic.device import device_kind


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

    The kernels have no gradient. The gradient of this function is that of grouped_pallas_experts at
    the same inputs, or of portable_experts where that cannot compute it, at the cost of the other
    function's forward and backward pass.

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
    x, weights, ids, expert_weights = saved
    sizes = weights.gate_up.shape[2:]
    run = portable_experts
    if not any(size % SIZE_MULTIPLE for size in sizes) and (interpret or runs_on(device_kind())):
        run = functools.partial(grouped_pallas_experts, interpret=interpret)

    def differentiable(x, weights, expert_weights):
        return run(x, weights, ids, expert_weights, activation)

    _, pull = jax.vjp(differentiable, x, weights, expert_weights)
    of_x, of_weights, of_expert_weights = pull(cotangent)
    return of_x, of_weights, None, of_expert_weights


pallas_experts.defvjp(_forward, _backward)
