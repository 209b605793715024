"""The grouped products of pallas_kernels as a backend: prefill and training on a GPU."""

import jax

from pallas_kernels.block_scaled_fp8 import dequantise
from pallas_kernels.decode_experts import ExpertWeights
from pallas_kernels.grouped_matmul import (
    combine_rows,
    gather_rows,
    gather_weights,
    group_assignments,
    grouped_matmul,
    grouped_swiglu,
)


def grouped_pallas_experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str = "silu",
    interpret: bool = False,
) -> jax.Array:
    """Sorts by expert, multiplies twice, adds a token's K outputs. Has gradients.

    The routing weight multiplies the intermediate, in float32 in the first product's epilogue. So
    its gradient needs no outputs, and the last sum adds rows as they are.

    Arguments and result as in portable_experts, bfloat16 only; weights of experts that are not used
    may hold anything. BlockScaledFp8 weights are dequantised first, all of the layer's.

    Args:
      activation: silu, which the kernels have built in.
      interpret: whether to run in Pallas's interpret mode.
    """
    del activation  # the backends declare which
    if weights.quantised:
        gate_up, down = (dequantise(each, x.dtype) for each in (weights.gate_up, weights.down))
        weights = ExpertWeights(gate_up=gate_up, down=down)
    assignments = group_assignments(ids, weights.gate_up.shape[0])
    groups = assignments.groups
    rows = gather_rows(x, assignments)  # [R, H]
    row_weights = gather_weights(expert_weights, assignments)  # [R]
    hidden = grouped_swiglu(rows, weights.gate_up, row_weights, groups, interpret=interpret)
    outputs = grouped_matmul(hidden, weights.down, groups, interpret=interpret)  # [R, H]
    return combine_rows(outputs, assignments)
