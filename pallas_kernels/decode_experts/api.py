"""decode_experts: the experts of one MoE layer at decode time, one op in several layouts."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts import expert_major, output_major, streamed
from pallas_kernels.decode_experts.checks import check_grouping, check_inputs
from pallas_kernels.decode_experts.grouping import Grouping
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights

# A layout is a module with Config, default_config(shapes, T), check_config(config, shapes) and
# run(...). A new one joins by its line here.
LAYOUTS: dict[str, ModuleType] = {
    "output_major": output_major,
    "expert_major": expert_major,
    "streamed": streamed,
}

# The largest T at which output_major was the faster one: one H100 80GB HBM3, Qwen3-30B-A3B's layer,
# results/compare_layouts.
_OUTPUT_MAJOR_UP_TO = 8


class LayoutChoice(NamedTuple):
    """A layout and why it was chosen."""

    layout: str
    why: str


def choose_layout(device: str, shapes: ExpertShapes, T: int) -> LayoutChoice:
    """Says which layout `layout="auto"` runs. The only place that chooses one.

    Args:
      device: the device's kind, as `jax.devices()[0].device_kind`; not used by the rule so far.
      shapes: the layer's sizes; not used by the rule so far.
      T: tokens in the batch.

    Returns:
      The layout's name and the reason in words.
    """
    del device, shapes
    if T <= _OUTPUT_MAJOR_UP_TO:
        return LayoutChoice(
            "output_major",
            f"T = {T} <= {_OUTPUT_MAJOR_UP_TO}: what it saves by not grouping tokens is more than "
            "its second reads of shared experts cost, as measured on an H100",
        )
    return LayoutChoice(
        "expert_major",
        f"T = {T} > {_OUTPUT_MAJOR_UP_TO}: tokens share so many experts that reading each one once "
        "pays for grouping them, as measured on an H100",
    )


def decode_experts(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    layout: str = "auto",
    grouping: Grouping | None = None,
    config: Any = None,
    out_dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """Computes out[t] = sum over k of w[t,k] * down_e(silu(gate_e x_t) * up_e x_t), e = ids[t,k].

    bf16 in, float32 from the first product to the last sum, rounded once to out_dtype. The same
    input gives the same bits, and within a layout a token's bits depend neither on its neighbours
    nor on its place in the batch ("auto" may take another layout at another T).

    Args:
      x: [T, H] bfloat16.
      weights: gate_up [E, 2, I, H] and down [E, H, I], bfloat16; H and I multiples of 64.
      expert_ids: [T, K] int32, K <= E. An id outside [0, E) is padding: it contributes nothing,
        whatever stands in its routing weight or in x, and no expert's weights are read for it.
      expert_weights: [T, K] float32.
      layout: "output_major", "expert_major", "streamed", or "auto" (choose_layout says which).
      grouping: what group(expert_ids, expert_weights, E) returns, if the caller has it already;
        only expert_major reads one, and makes its own if None.
      config: the layout's Config; None takes its default for these sizes.
      out_dtype: bfloat16 or float32; None means x.dtype.
      interpret: True runs the kernels in Pallas's interpret mode, on a CPU; an InterpretGPUParams
        does too, with its own options. The interpreter's callbacks can wait for each other for ever
        under asynchronous dispatch: first set jax.config's jax_cpu_enable_async_dispatch to False.

    Returns:
      [T, H] in out_dtype.

    Raises:
      ValueError: a shape, a size, a layout's name or a config does not fit; the message names it.
      TypeError: a dtype or a config's type is not one that is accepted.
      NotImplementedError: float32 or quantised weights, or a gradient was asked for.
    """
    shapes, T = check_inputs(x, weights, expert_ids, expert_weights, out_dtype)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if not isinstance(interpret, (bool, plgpu.InterpretGPUParams)):
        raise TypeError(f"interpret is {interpret!r}; expected a bool or an InterpretGPUParams")
    if layout == "auto":
        layout = choose_layout(jax.devices()[0].device_kind, shapes, T).layout
    if layout not in tuple(LAYOUTS):
        raise ValueError(f"layout is {layout!r}; expected 'auto' or one of {sorted(LAYOUTS)}")
    kernel = LAYOUTS[layout]
    if config is None:
        config = kernel.default_config(shapes, T)
    if not isinstance(config, kernel.Config):
        raise TypeError(f"config is {config!r}; layout {layout!r} takes a {kernel.Config.__name__}")
    kernel.check_config(config, shapes)
    if grouping is not None:
        check_grouping(grouping, T, shapes)
    run = functools.partial(
        kernel.run, config=config, out_dtype=out_dtype, interpret=interpret, grouping=grouping
    )
    return _without_gradient(run, layout)(x, weights, expert_ids, expert_weights)


def _without_gradient(run, layout: str):
    """Turns a request for a derivative into an error that says what has one."""

    @jax.custom_jvp
    def forward(*arguments):
        return run(*arguments)

    @forward.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"decode_experts layout {layout!r} has no gradient; reference_experts has one"
        )

    return forward
