"""A layer's sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShapes:
    """The sizes of one MoE layer: E experts, K of them for each token, H hidden, I intermediate."""

    E: int
    K: int
    H: int
    I: int
