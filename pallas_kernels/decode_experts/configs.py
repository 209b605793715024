"""What a layout is, and the checks that the layouts' Configs share."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.mosaic.device import SHARED_MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay the experts' math out over a GPU: the constant at the foot of its file.

    Attributes:
      name: in `layout=`, in tables and records.
      capabilities: the GPUs it compiles for, as mosaic.device.capability_of says them.
      sum_order: a name for the order of sums. Layouts of one name give a token the same bits on a
        GPU, with any config and at any T.
      Config: a frozen dataclass of ints, bools and None.
      default_config: (shapes, T) -> the heuristic, the same at every T.
      candidates: (shapes, T) -> a few configs worth measuring, the default first.
      check: (config, shapes) raises a ValueError that names the field.
      run: (x, weights, expert_ids, expert_weights, *, config, out_dtype, interpret) -> [T, H], on
        checked inputs; shapes as in decode_experts.
    """

    name: str
    capabilities: tuple[int, ...]
    sum_order: str
    Config: type
    default_config: Callable[[ExpertShapes, int], Any]
    candidates: Callable[[ExpertShapes, int], list[Any]]
    check: Callable[[Any, ExpertShapes], None]
    run: Callable[..., jax.Array]


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


def check_block(field: str, value: int, accepted: tuple[int, ...], letter: str, size: int) -> None:
    """Raises a ValueError unless `value` is one of `accepted` and divides the size."""
    fitting = [a for a in accepted if size % a == 0]
    if value not in fitting:
        raise ValueError(
            f"config.{field} is {value!r}; expected one of {fitting}, the divisors of "
            f"{letter} = {size} among what it takes"
        )


def check_num_stages(
    field: str, num_stages: int, stage_bytes: int, least: int, reserved: int = 0
) -> None:
    """Raises a ValueError unless there are `least` stages at least, and they fit shared memory.

    Args:
      field: of the config, for the message.
      num_stages, stage_bytes: how many, and the size of each.
      least: how many there must be.
      reserved: bytes of shared memory that stages cannot have.
    """
    room = SHARED_MEMORY_BYTES - reserved
    most = room // stage_bytes
    # True is an int to Python.
    is_number = isinstance(num_stages, int) and not isinstance(num_stages, bool)
    if not is_number or not least <= num_stages <= most:
        raise ValueError(
            f"config.{field} is {num_stages!r}; expected an integer from {least} to {most}: a "
            f"stage takes up to {stage_bytes} of {room} bytes of shared memory"
        )
