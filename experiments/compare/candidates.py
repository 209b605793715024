"""What is compared: our layouts and the baselines, behind one signature.

layer(x [T, H] bf16, weights, expert_ids [T, K], expert_weights [T, K]) -> [T, H]
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.compare import baselines, peers, timing
from pallas_kernels.decode_experts import (
    LAYOUTS,
    MODES,
    ExpertShapes,
    choose_layout,
    decode_experts,
)
from pallas_kernels.mosaic.device import device_kind

BASELINES = (*baselines.XLA_BASELINES, "tokamax", "vllm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the table.

    Attributes:
      kind: "layout" or "baseline".
      name: a layout's, a mode's or a baseline's name.
      backend: what runs it, in a few words.
      layer: the layer with its output in the asked dtype.
      config: at T tokens, what it was configured with, as plain JSON values; None if nothing.
      layer_float32: the layer with a float32 output, if it has one before the last rounding.
      timed: False for an emulation, which is run for its error alone.
      is_jax: False where `layer` cannot be jitted and `chain` is no XLA program.
      chain: makes a timing.Chain of (layer, layers, routings, x, steps).
    """

    kind: str
    name: str
    backend: str
    layer: Callable
    config: Callable[[int], dict[str, Any] | None] = lambda T: None
    layer_float32: Callable | None = None
    timed: bool = True
    is_jax: bool = True
    chain: Callable[..., timing.Chain] = timing.JaxChain


def make_layouts(
    names: Sequence[str], shapes: ExpertShapes, out_dtype, interpret: bool
) -> list[Candidate]:
    """The layouts and modes by name; `interpret` runs them on a CPU."""

    def config(name, T):
        if name not in MODES:
            return dataclasses.asdict(LAYOUTS[name].default_config(shapes, T))
        choice = choose_layout(device_kind(), shapes, T, name)
        chosen = choice.config or LAYOUTS[choice.layout].default_config(shapes, T)
        return {"layout": choice.layout} | dataclasses.asdict(chosen)

    def make(name):
        run = functools.partial(decode_experts, layout=name, interpret=interpret)
        return Candidate(
            kind="layout",
            name=name,
            backend="mosaic_gpu interpreter" if interpret else "mosaic_gpu",
            layer=functools.partial(run, out_dtype=out_dtype),
            layer_float32=functools.partial(run, out_dtype=jnp.float32),
            config=functools.partial(config, name),
            timed=not interpret,
        )

    return [make(name) for name in names]


def make_baselines(names: Sequence[str], out_dtype) -> tuple[list[Candidate], list[str]]:
    """The baselines that can run here, and for each of the others a line that says why not."""
    found, left_out = [], []
    for name in names:
        if name in baselines.XLA_BASELINES:
            layer = baselines.XLA_BASELINES[name]
            timed = name not in baselines.ACCURACY_ONLY
            candidate = Candidate(
                kind="baseline",
                name=name,
                backend="xla" if timed else "xla, emulation",
                layer=functools.partial(layer, out_dtype=out_dtype),
                timed=timed,
            )
        elif why := peers.missing(name):
            left_out.append(f"baseline {name} is left out: {why}")
            continue
        elif name == "tokamax":
            candidate = Candidate(
                kind="baseline",
                name=name,
                backend="tokamax ragged_dot",
                layer=functools.partial(peers.tokamax_layer, out_dtype=out_dtype),
            )
        else:
            candidate = Candidate(
                kind="baseline",
                name=name,
                backend="vllm fused_experts, torch CUDA graph",
                layer=functools.partial(peers.vllm_layer, out_dtype=out_dtype),
                is_jax=False,
                chain=lambda layer, *arguments: peers.VllmChain(*arguments),
            )
        found.append(candidate)
    return found, left_out


def expect_some(found: list[Candidate], left_out: Sequence[str]) -> list[Candidate]:
    """Returns the candidates, or ends the program where all that was asked for is left out."""
    if not found:
        raise SystemExit("compare_layouts: nothing is left to run; " + "; ".join(left_out))
    return found
