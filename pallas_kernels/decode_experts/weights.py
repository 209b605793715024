"""The stored weights that every layout reads, a layer's sizes, and where a block of rows lies."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The one stored copy of a layer's expert weights; rows are contiguous along the contraction.

    Attributes:
      gate_up: [E, 2, I, H]; gate_up[:, 0] projects to the gate, gate_up[:, 1] to the up half.
      down: [E, H, I].
      gate_up_scale: scales of quantised gate_up weights, None for plain ones.
      down_scale: scales of quantised down weights, None for plain ones.
    """

    gate_up: jax.Array
    down: jax.Array
    gate_up_scale: jax.Array | None = None
    down_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShapes:
    """The sizes of one MoE layer: E experts, K of them for each token, H hidden, I intermediate."""

    E: int
    K: int
    H: int
    I: int


def gate_and_up_rows(expert, block, R: int, I: int):
    """First row of the gate half and of the up half of a block of R neurons, in [E*2*I, H].

    Plain integer arithmetic, for Python ints, numpy arrays and traced scalars alike.
    """
    gate = expert * (2 * I) + block * R
    return gate, gate + I


def down_rows(expert, block, R: int, H: int):
    """First row of a block of R output neurons, in [E*H, I]."""
    return expert * H + block * R
