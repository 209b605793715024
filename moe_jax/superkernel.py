"""Superkernel scopes: named regions of a decode step that a compiler may make one launch of.

    y = superkernel_scope(enabled, "moe_experts")(function)(x, weights, ids)

decoder.scoped opens the scopes of the blocks, and decode_step.py that of the kernels' decode step.

In CANN's recipes a `with` block marks the region. JAX cannot outline one, so here a scope wraps a
function, and the region is that function: everything it computes with has to be an argument. What a
scope does depends on the platform:

    ascend       the region is a StableHLO composite named "superkernel.<label>", with a version and
                 the options as attributes; its decomposition is the plain computation
    elsewhere    the region is a named scope, as profiles and HLO metadata show it

The kernels' decode step has a named scope around all layers, and cuts a layer into two launches
where a scope asks for a part of it.

It changes how kernels are launched and never what they compute: outputs are the same, bit for bit,
from a compiler that rounds where the program says so. (XLA may leave out a rounding to bfloat16
where it sees both sides, unless its xla_allow_excess_precision is off.)
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from moe_jax.platforms import resolve_platform

# config.superkernel_scope -> the label of its regions.
SCOPES: dict[str, str] = {
    "moe": "moe_experts",  # the experts, with routing outside
    "attention": "attention",
    "model": "decode_layers",  # all layers at once
}

# Of the composite: to be raised when its arguments or results change.
VERSION = 2

_open_label: contextvars.ContextVar[str | None] = contextvars.ContextVar("open", default=None)


def superkernel_scope(
    enabled: bool, label: str, *, stream_fusion: bool = False, platform: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a function of arrays so that what it computes is one region.

    Scopes are for decode steps, whose shapes are static and whose kernels are small. So `enabled`
    is `asked_for and not is_prefill`, and a prefill runs as if there were no scope.

    Args:
      enabled: False returns the function as it is.
      label: one of SCOPES' values.
      stream_fusion: whether kernels of the region that are independent may run side by side.
      platform: as in resolve_platform.

    Returns:
      A function that takes `function` and returns one of the same arguments, all of them pytrees
      of arrays, and of the same results. On Ascend it has no gradient.

    Raises:
      ValueError: no such label.
      RuntimeError: when called inside another scope; the message names both.
    """
    if label not in SCOPES.values():
        raise ValueError(f"label is {label!r}; expected one of {list(SCOPES.values())}")

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        if not enabled:
            return function

        def region(*arrays, **attributes):
            del attributes  # the composite's own
            with _entered(label), jax.named_scope(f"superkernel.{label}"):
                return function(*arrays)

        if resolve_platform(platform) != "ascend":
            return region
        composite = jax.lax.composite(region, name=f"superkernel.{label}", version=VERSION)

        def outlined(*arrays):
            return composite(*arrays, stream_fusion=stream_fusion)

        return outlined

    return wrap


def configured_scope(config, name: str, *, phase: str, platform: str):
    """superkernel_scope of SCOPES[name], enabled if the config asks for it and this is a decode.

    Args:
      config: a Qwen3MoeConfig.
      name: a key of SCOPES.
      phase: "prefill", "decode" or "training".
      platform: as in resolve_platform.
    """
    asked_for = config.enable_superkernel and config.superkernel_scope == name
    return superkernel_scope(asked_for and phase == "decode", SCOPES[name], platform=platform)


@contextlib.contextmanager
def _entered(label: str) -> Iterator[None]:
    outer = _open_label.get()
    if outer is not None:
        raise RuntimeError(f"superkernel scope {label!r} is inside {outer!r}; scopes do not nest")
    token = _open_label.set(label)
    try:
        yield
    finally:
        _open_label.reset(token)
