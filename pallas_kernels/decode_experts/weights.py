"""The containers that every layout reads: the stored weights and the sizes of a layer."""

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
