"""Which of the measurements go into the table."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from pallas_kernels.decode_experts import LAYOUTS

# Times so near are taken for equal: compiled twice, one kernel differs by more. The earlier of the
# candidates wins then, a layout's default before its other configs.
_EQUAL = 1.01


class Timed(Protocol):
    """A measurement: a layout, its config, microseconds."""

    layout: str
    config: object
    us: float


def fastest[M: Timed](measured: Sequence[M]) -> M:
    """The first one that is as good as the fastest."""
    limit = _EQUAL * min(m.us for m in measured)
    return next(m for m in measured if m.us <= limit)


def contenders[M: Timed](measured: Sequence[M]) -> list[M]:
    """Who of one T may get into the table: the fastest, and the fastest of each order of sums."""
    found: list[M] = []
    groups = [measured] if measured else []
    groups += [_of_order(measured, order) for order in dict.fromkeys(_orders(measured))]
    for group in groups:
        if (winner := fastest(group)) not in found:
            found.append(winner)
    return found


def invariant[M: Timed](measured: dict[int, Sequence[M]]) -> dict[int, M]:
    """For each T the one that "invariant" takes: all of one order of sums.

    Of the orders that were measured at every T, the one with the least total; within it, the
    fastest layout and config of each T.

    Args:
      measured: for each T what was measured there.

    Returns:
      Empty if no order of sums was measured at every T.
    """
    choices: list[dict[int, M]] = []
    for order in dict.fromkeys(_orders(m for some in measured.values() for m in some)):
        of_order = {T: _of_order(some, order) for T, some in measured.items()}
        if all(of_order.values()):
            choices.append({T: fastest(some) for T, some in of_order.items()})
    if not choices:
        return {}
    totals = [sum(m.us for m in choice.values()) for choice in choices]
    return next(
        choice
        for choice, total in zip(choices, totals, strict=True)
        if total <= _EQUAL * min(totals)
    )


def _of_order[M: Timed](measured: Sequence[M], order: str) -> list[M]:
    return [m for m in measured if order == LAYOUTS[m.layout].sum_order]


def _orders(measured: Iterable[Timed]) -> list[str]:
    return [LAYOUTS[m.layout].sum_order for m in measured]
