"""The checks that the layouts' Configs share; each error names the field and what it accepts."""

from collections.abc import Callable, Iterable
from typing import Any

from pallas_kernels.decode_experts.weights import ExpertShapes
from pallas_kernels.mosaic import SHARED_MEMORY_BYTES


def largest_divisor(size: int, candidates: tuple[int, ...]) -> int:
    """The largest candidate that divides `size`."""
    return max(c for c in candidates if size % c == 0)


def valid_configs(
    check: Callable[[Any, ExpertShapes], None], configs: Iterable[Any], shapes: ExpertShapes
) -> list[Any]:
    """Those of `configs` that `check` takes for these sizes, each once, in their order."""
    valid = []
    for config in configs:
        try:
            check(config, shapes)
        except ValueError:
            continue
        if config not in valid:
            valid.append(config)
    return valid


def check_tile(field: str, value: int, accepted: tuple[int, ...], letter: str, size: int) -> None:
    """Raises a ValueError unless `value` is one of `accepted` and divides the size."""
    fitting = [a for a in accepted if size % a == 0]
    if value not in fitting:
        raise ValueError(
            f"config.{field} is {value!r}; expected one of {fitting}, the divisors of "
            f"{letter} = {size} among what it takes"
        )


def check_slots(field: str, slots: int, bytes_a_slot: int, least: int) -> None:
    """Raises a ValueError unless a ring has at least `least` slots and fits in shared memory."""
    most = SHARED_MEMORY_BYTES // bytes_a_slot
    # True is an int to Python.
    if isinstance(slots, bool) or not isinstance(slots, int) or not least <= slots <= most:
        raise ValueError(
            f"config.{field} is {slots!r}; expected an integer from {least} to {most}: a slot "
            f"takes up to {bytes_a_slot} of {SHARED_MEMORY_BYTES} bytes of shared memory"
        )
