"""What is compared and tuned: our layouts with their configs, and the baselines, by name.

A layer is a function (x [T, H] bf16, weights, expert_ids [T, K], expert_weights [T, K]) -> [T, H].
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.bench import baselines, timing
from experiments.bench.inputs import RESTART_EVERY, layer_step
from pallas_kernels.decode_experts import (
    LAYOUTS,
    MODES,
    ExpertShapes,
    choose_layout,
    decode_experts,
)
from pallas_kernels.mosaic.device import device_kind

LAYOUT_NAMES = (*LAYOUTS, *MODES)
BASELINES = (*baselines.XLA_BASELINES, "tokamax", "vllm")


class Configured(NamedTuple):
    """A layout and one of its configs."""

    layout: str
    config: Any

    def __str__(self):
        fields = dataclasses.asdict(self.config)
        return f"{self.layout}({', '.join(f'{name}={value}' for name, value in fields.items())})"


def configured(name: str, shapes: ExpertShapes, T: int) -> Configured:
    """What a layout's or a mode's name runs at T tokens on this device."""
    if name not in MODES:
        return Configured(name, default_config(name, shapes, T))
    choice = choose_layout(device_kind(), shapes, T, name)
    return Configured(choice.layout, choice.config or default_config(choice.layout, shapes, T))


def default_config(layout: str, shapes: ExpertShapes, T: int) -> Any:
    """What a layout runs with where nothing else is asked for."""
    return LAYOUTS[layout].default_config(shapes, T)


def sum_order(layout: str) -> str:
    """The name of a layout's order of sums: layouts of one name give the same bits."""
    return LAYOUTS[layout].sum_order


def configs_to_tune(
    layouts: Sequence[str], shapes: ExpertShapes, T: int, most_configs: int | None
) -> list[Configured]:
    """Each layout's candidates, its default first."""
    return [
        Configured(layout, config)
        for layout in layouts
        for config in LAYOUTS[layout].candidates(shapes, T)[:most_configs]
    ]


@functools.cache
def configured_layer(what: Configured, out_dtype: Any, interpret: bool = False) -> Callable:
    """The layer, jitted: one function for equal arguments, so that it is compiled once."""
    return jax.jit(
        functools.partial(
            decode_experts,
            layout=what.layout,
            config=what.config,
            out_dtype=out_dtype,
            interpret=interpret,
        )
    )


class Program(NamedTuple):
    """What a candidate runs at some T.

    Attributes:
      key: equal for candidates that run the same.
      layer: with its output in the asked dtype.
      layer_float32: with a float32 output, if it has one before the last rounding.
      config: what it was configured with, as plain JSON values; None if nothing.
    """

    key: Hashable
    layer: Callable
    layer_float32: Callable | None = None
    config: dict[str, Any] | None = None


def layer_chain(layer: Callable, x: jax.Array, steps: Sequence[Any]) -> timing.Chain:
    """A chain of a JAX layer; `steps` are LayerInputs.steps."""
    return timing.Chain(layer_step(layer), x, steps, restart_every=RESTART_EVERY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the table.

    Attributes:
      kind: "layout" or "baseline".
      name: a layout's, a mode's or a baseline's name.
      backend: what runs it, in a few words.
      at: T -> the program.
      timed: False for an emulation, which is run for its error alone.
      is_jax: False where the layer cannot be jitted and `chain` is no XLA program.
      chain: makes what is timed of (layer, x, steps).
    """

    kind: str
    name: str
    backend: str
    at: Callable[[int], Program]
    timed: bool = True
    is_jax: bool = True
    chain: Callable[..., timing.Timeable] = layer_chain


def make_layouts(
    names: Sequence[str], shapes: ExpertShapes, out_dtype, interpret: bool
) -> list[Candidate]:
    """The layouts and modes by name; `interpret` runs them on a CPU."""

    def program(name: str, T: int) -> Program:
        what = configured(name, shapes, T)
        mode = {"layout": what.layout} if name in MODES else {}
        return Program(
            key=what,
            layer=configured_layer(what, out_dtype, interpret),
            layer_float32=configured_layer(what, jnp.float32, interpret),
            config=mode | dataclasses.asdict(what.config),
        )

    return [
        Candidate(
            kind="layout",
            name=name,
            backend="mosaic_gpu interpreter" if interpret else "mosaic_gpu",
            at=functools.partial(program, name),
            timed=not interpret,
        )
        for name in names
    ]


def make_baselines(
    names: Sequence[str], out_dtype, weights: str = "bf16"
) -> tuple[list[Candidate], list[str]]:
    """The baselines that can run here, and for each of the others a line that says why not."""
    found, left_out = [], []
    for name in names:
        if weights != "bf16":
            left_out.append(f"baseline {name} is left out: it takes bf16 weights, not {weights}")
        elif name not in baselines.XLA_BASELINES and (why := baselines.missing(name)):
            left_out.append(f"baseline {name} is left out: {why}")
        else:
            found.append(_baseline(name, out_dtype))
    return found, left_out


def _baseline(name: str, out_dtype) -> Candidate:
    layer = {
        **baselines.XLA_BASELINES,
        "tokamax": baselines.tokamax_layer,
        "vllm": baselines.vllm_layer,
    }[name]
    layer = functools.partial(layer, out_dtype=out_dtype)
    if name == "vllm":
        return Candidate(
            kind="baseline",
            name=name,
            backend="vllm fused_experts, torch CUDA graph",
            at=lambda T: Program(name, layer),
            is_jax=False,
            chain=lambda layer, x, steps: baselines.VllmChain(x, steps, RESTART_EVERY),
        )
    emulation = name in baselines.ACCURACY_ONLY
    backend = "xla, emulation" if emulation else "xla"
    jitted = jax.jit(layer)
    return Candidate(
        kind="baseline",
        name=name,
        backend="tokamax ragged_dot" if name == "tokamax" else backend,
        at=lambda T: Program(name, jitted),
        timed=not emulation,
    )
