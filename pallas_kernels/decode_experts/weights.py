"""The stored weights that every layout reads, and where a block of their rows lies."""

import dataclasses

import jax

from pallas_kernels.block_scaled_fp8 import Weight, in_whole_blocks, is_fp8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The one stored copy of a layer's expert weights; rows are contiguous along the contraction.

    Attributes:
      gate_up: [E, 2, I, H]; gate_up[:, 0] projects to the gate, gate_up[:, 1] to the up half.
      down: [E, H, I]. Both are plain arrays, or both are BlockScaledFp8.
    """

    gate_up: Weight
    down: Weight

    @property
    def quantised(self) -> bool:
        return any(map(is_fp8, (self.gate_up, self.down)))

    @property
    def in_whole_blocks(self) -> bool:
        """Whether FP8 weights are as the kernels take them: no block of another size, none cut off.

        True of plain weights.
        """
        return all(in_whole_blocks(w) for w in (self.gate_up, self.down) if is_fp8(w))

    def as_rows(self) -> "ExpertWeights":
        """The same as matrices: gate_up [E*2*I, H] and down [E*H, I]; scales likewise."""
        return jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), self)

    def as_halves(self) -> "ExpertWeights":
        """As as_rows, but gate_up's values [E*2, I, H]; of FP8 weights."""
        rows = self.as_rows()
        values = self.gate_up.values.reshape(-1, *self.gate_up.shape[2:])
        gate_up = dataclasses.replace(rows.gate_up, values=values)
        return dataclasses.replace(rows, gate_up=gate_up)


def gate_and_up_rows(expert, block, neurons: int, I: int):
    """First row of the gate half and of the up half of a block of neurons, in [E*2*I, H].

    Plain integer arithmetic, for Python ints, numpy arrays and traced scalars alike.
    """
    gate = expert * (2 * I) + block * neurons
    return gate, gate + I


def down_rows(expert, block, neurons: int, H: int):
    """First row of a block of output neurons, in [E*H, I]."""
    return expert * H + block * neurons
