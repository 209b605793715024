"""Products of rows sorted by expert, with gradients, and what stands around them.

    x [T, H] --gather_rows--> rows [R, H] --grouped_swiglu--> hidden [R, I]
             --grouped_matmul--> outputs [R, H] --combine_rows--> [T, H]

Every gradient is one of these operations again: combining is the gradient of gathering, and the
other way round. So no float is added atomically, and the same inputs give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.gradient_to_weights import gradient_to_weights
from pallas_kernels.grouped_matmul.groups import GroupedAssignments, Groups
from pallas_kernels.grouped_matmul.rows_by_weights import rows_by_weights, swiglu_by_weights
from pallas_kernels.grouped_matmul.tiles import SIZE_MULTIPLE, GroupedMatmulConfig, check_config
from pallas_kernels.mosaic.device import (
    ANY,
    HOPPER,
    capability_of,
    check_interpret,
    expect_capability,
)
from pallas_kernels.mosaic.operands import expect_array
from pallas_kernels.row_sums import sum_rows


def runs_on(device_kind: str) -> bool:
    """Whether the kernels have the instructions of that kind of GPU, as far as its name says."""
    return capability_of(device_kind) in (None, HOPPER)


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    groups: Groups,
    *,
    config: GroupedMatmulConfig | None = None,
    interpret: Any = False,
) -> jax.Array:
    """out[r] = weights[expert of r] @ rows[r], summed in float32 and rounded once; has gradients.

    Args:
      rows: [R, in] bfloat16. A row of padding is zeros, or the gradient to the weights is wrong.
      weights: [E, out, in] bfloat16, as stored. In and out are multiples of 128.
      groups: whose rows are which expert's, from group_assignments.
      config: how to cut; None for what is the fastest on an H100.
      interpret: as in decode_experts.

    Returns:
      [R, out] bfloat16. Rows in no group are undefined; those of padding are zeros.

    Raises:
      ValueError: a shape or a size does not fit; the message names it.
      TypeError: a dtype or type is not one that is accepted.
      NotImplementedError: another float dtype, or a GPU without the kernels' instructions.
    """
    config = config or GroupedMatmulConfig()
    _check("weights", weights, "[E, out, in]", rows, groups, config, interpret)
    return _grouped_matmul(rows, weights, groups, config, interpret)


def grouped_swiglu(
    rows: jax.Array,
    gate_up: jax.Array,
    row_weights: jax.Array,
    groups: Groups,
    *,
    config: GroupedMatmulConfig | None = None,
    interpret: Any = False,
) -> jax.Array:
    """out[r] = row_weights[r] * silu(gate_e @ rows[r]) * (up_e @ rows[r]), e the expert of r.

    float32 from the products on, rounded once. Has gradients, for which gate and up are kept in
    bfloat16.

    Args:
      rows: [R, H] bfloat16. A row of padding is zeros, or the gradient to the weights is wrong.
      gate_up: [E, 2, I, H] bfloat16, as stored. H and I are multiples of 128.
      row_weights: [R] float32, from gather_weights.
      groups, config, interpret: as in grouped_matmul.

    Returns:
      [R, I] bfloat16. Rows in no group are undefined; those of padding are zeros.

    Raises:
      ValueError, TypeError, NotImplementedError: as in grouped_matmul.
    """
    config = config or GroupedMatmulConfig()
    _check("gate_up", gate_up, "[E, 2, I, H]", rows, groups, config, interpret)
    if gate_up.shape[1] != 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; expected [E, 2, I, H]")
    expect_array("row_weights", row_weights, "[R]", jnp.float32)
    if row_weights.shape != (groups.R,):
        raise ValueError(f"row_weights has shape {row_weights.shape}; expected [R] = ({groups.R},)")
    return _grouped_swiglu(rows, gate_up, row_weights, groups, config, interpret)


def _check(name: str, weights, letters: str, rows, groups: Groups, config, interpret) -> None:
    check_interpret(interpret)
    expect_array("rows", rows, "[R, in]", jnp.bfloat16, instead="reference_grouped_matmul")
    expect_array(name, weights, letters, jnp.bfloat16, instead="reference_grouped_matmul")
    width = weights.shape[-1]
    if rows.shape != (groups.R, width):
        raise ValueError(f"rows has shape {rows.shape}; expected [R, in] = {(groups.R, width)}")
    if weights.shape[0] != groups.E:
        raise ValueError(f"{name} has {weights.shape[0]} experts; groups has {groups.E}")
    for size in weights.shape[-2:]:
        if size % SIZE_MULTIPLE:
            raise ValueError(
                f"{name} has shape {weights.shape}; expected multiples of {SIZE_MULTIPLE} in its "
                "last two dimensions"
            )
    check_config(config)
    others = {"XLA's lax.ragged_dot_general": ANY}
    expect_capability("grouped_matmul", (HOPPER,), others, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(rows, weights, groups, config, interpret):
    return rows_by_weights(
        rows, weights, groups, transposed=False, config=config, interpret=interpret
    )


def _matmul_forward(rows, weights, groups, config, interpret):
    out = _grouped_matmul(rows, weights, groups, config, interpret)
    return out, (rows, weights, groups)


def _matmul_backward(config, interpret, saved, cotangent):
    rows, weights, groups = saved
    of_rows = rows_by_weights(
        cotangent, weights, groups, transposed=True, config=config, interpret=interpret
    )
    of_weights = gradient_to_weights(cotangent, rows, groups, config=config, interpret=interpret)
    return of_rows, of_weights, None


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_swiglu(rows, gate_up, row_weights, groups, config, interpret):
    hidden, _ = swiglu_by_weights(
        rows, gate_up, row_weights, groups,
        keep_projected=False, config=config, interpret=interpret,
    )  # fmt: skip
    return hidden


def _swiglu_forward(rows, gate_up, row_weights, groups, config, interpret):
    hidden, projected = swiglu_by_weights(
        rows, gate_up, row_weights, groups,
        keep_projected=True, config=config, interpret=interpret,
    )  # fmt: skip
    return hidden, (rows, gate_up, row_weights, groups, projected)


def _swiglu_backward(config, interpret, saved, cotangent):
    rows, gate_up, row_weights, groups, projected = saved
    E, _, I, H = gate_up.shape

    def swiglu(gate, up, row_weights):
        return row_weights[:, None] * jax.nn.silu(gate) * up

    gate, up = (half.astype(jnp.float32) for half in (projected[:, :I], projected[:, I:]))
    _, pull = jax.vjp(swiglu, gate, up, row_weights)
    of_gate, of_up, of_row_weights = pull(cotangent.astype(jnp.float32))
    of_projected = jnp.concatenate([of_gate, of_up], axis=1).astype(rows.dtype)  # [R, 2I]
    of_rows = rows_by_weights(
        of_projected, gate_up.reshape(E, 2 * I, H), groups,
        transposed=True, config=config, interpret=interpret,
    )  # fmt: skip
    of_weights = gradient_to_weights(of_projected, rows, groups, config=config, interpret=interpret)
    return of_rows, of_weights.reshape(gate_up.shape), of_row_weights, None


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def gather_rows(x: jax.Array, assignments: GroupedAssignments) -> jax.Array:
    """[R, H]: each row's token of x [T, H]; zeros in rows of padding."""
    of_row = assignments.assignment_of
    return jnp.where((of_row >= 0)[:, None], x[jnp.maximum(of_row, 0) // assignments.K], 0)


@jax.custom_vjp
def combine_rows(rows: jax.Array, assignments: GroupedAssignments) -> jax.Array:
    """[T, H]: the sum of each token's rows of [R, H], in the order of k, in float32."""
    return sum_rows(rows, assignments.row_of).astype(rows.dtype)


gather_rows.defvjp(
    lambda x, assignments: (gather_rows(x, assignments), assignments),
    lambda assignments, cotangent: (combine_rows(cotangent, assignments), None),
)
combine_rows.defvjp(
    lambda rows, assignments: (combine_rows(rows, assignments), assignments),
    lambda assignments, cotangent: (gather_rows(cotangent, assignments), None),
)


@jax.custom_vjp
def gather_weights(expert_weights: jax.Array, assignments: GroupedAssignments) -> jax.Array:
    """[R] float32: each row's routing weight, of expert_weights [T, K]; 0 in rows of padding."""
    of_row = assignments.assignment_of
    weights = expert_weights.reshape(-1)[jnp.maximum(of_row, 0)].astype(jnp.float32)
    return jnp.where(of_row >= 0, weights, 0)


def _weights_forward(expert_weights, assignments):
    # An array of no elements carries the dtype.
    return gather_weights(expert_weights, assignments), (assignments, expert_weights[:0])


def _weights_backward(saved, cotangent):
    assignments, like = saved
    row = assignments.row_of
    of_weights = jnp.where(row >= 0, cotangent[jnp.maximum(row, 0)], 0)
    return of_weights.astype(like.dtype), None


gather_weights.defvjp(_weights_forward, _weights_backward)
