"""Which layout runs where a caller does not name one: measured tables first, else a heuristic."""

import contextlib
import contextvars
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from pallas_kernels.decode_experts import tuned_tables
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.mosaic.device import HOPPER, capability_of

# What a caller may write in place of a layout's name.
MODES = {
    "auto": "the fastest at this T",
    "invariant": "layouts with one order of sums for every T of a shape",
}

# Up to which T a layout was the fastest: one H100 80GB HBM3, Qwen3-30B-A3B's layer,
# results/compare_layouts.
_FASTEST = (
    (2, "output_major", "tokens share few experts yet, so reading each one once gains little"),
    (math.inf, "expert_major", "tokens share many experts, so reading each one once pays"),
)
# With FP8 weights, one H200: its products are on the tensor cores, where converting costs less.
_FASTEST_IN_FP8 = ((math.inf, "expert_major", "its tensor cores have half the bytes to wait for"),)
# The same among layouts that give a token the same bits.
_INVARIANT = ((math.inf, "expert_major", "its sums do not know the batch"),)

_log = logging.getLogger(__name__)
_said: set[tuple[str, ExpertShapes]] = set()


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def override_layout(layout: str | None) -> Iterator[None]:
    """Inside the block, calls that leave the layout to a mode take this one, or this mode.

    To judge layouts by a whole model, which names none. A layout has its default config then. It is
    chosen when a call is traced, so a function that was compiled before keeps the layout it has.

    Args:
      layout: a layout's name or a mode; None leaves it to the caller's mode.
    """
    token = _override.set(layout)
    try:
        yield
    finally:
        _override.reset(token)


class LayoutChoice(NamedTuple):
    """A layout, why it was chosen, and its Config; None means the layout's default."""

    layout: str
    why: str
    config: Any = None


def choose_layout(device: str, shapes: ExpertShapes, T: int, mode: str = "auto") -> LayoutChoice:
    """Says which layout and config a mode runs. The only place that chooses one.

    The device's tuned table is asked first (tuned_tables.py says which entry serves which T). Where
    it has no answer a heuristic does; that is logged once for each device and shape.

    Args:
      device: the device's kind, as `jax.devices()[0].device_kind`.
      shapes: the layer's sizes.
      T: tokens in the batch.
      mode: "auto", the fastest, or "invariant", which never changes the order of sums with T.

    Raises:
      ValueError: mode is not one of these.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {sorted(MODES)}")
    asked = _override.get()
    if asked is not None and asked not in MODES:
        return LayoutChoice(asked, f"override_layout says {asked}")
    mode = asked or mode
    found = tuned_tables.find(device, shapes, T, invariant=mode == "invariant")
    if found.entry is None:
        _say_once(device, shapes, found.why)
        capability = capability_of(device)
        if capability not in (None, HOPPER):
            return LayoutChoice("output_major", f"{device} has no wgmma, which the others need")
        return _by_heuristic(mode, shapes, T)
    # A config that won with fewer tokens need not with more, and none changes a sum.
    config = found.entry.config if found.entry.T >= T else None
    return LayoutChoice(found.entry.layout, f"T = {T} takes {MODES[mode]}, {found.why}", config)


def _by_heuristic(mode: str, shapes: ExpertShapes, T: int) -> LayoutChoice:
    steps = _INVARIANT
    if mode == "auto":
        steps = _FASTEST if shapes.weights == "bf16" else _FASTEST_IN_FP8
    layout, why = next((layout, why) for up_to, layout, why in steps if up_to >= T)
    on = "an H100" if shapes.weights == "bf16" else "an H200"
    return LayoutChoice(layout, f"T = {T} takes {MODES[mode]}: {why}, as measured on {on}")


def _say_once(device: str, shapes: ExpertShapes, why: str) -> None:
    if (device, shapes) in _said:
        return
    _said.add((device, shapes))
    # Interpret mode's speed means nothing, so a CPU need not hear that it was not measured.
    level = logging.INFO if device == "cpu" else logging.WARNING
    _log.log(
        level,
        "decode_experts takes its layout by a heuristic: %s; "
        "`python -m experiments.tune` measures it (%s)",
        why,
        shapes,
    )
