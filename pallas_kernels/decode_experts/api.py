"""decode_experts: the experts of one MoE layer at decode time, one op in several layouts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_fp8 import (
    BLOCK,
    VALUES_DTYPE,
    BlockScaledFp8,
    Weight,
    check_block_scaled_fp8,
)
from pallas_kernels.decode_experts.choose_layout import MODES, choose_layout
from pallas_kernels.decode_experts.layouts import LAYOUTS
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.weights import ExpertWeights
from pallas_kernels.mosaic import device
from pallas_kernels.mosaic.operands import expect_array

SIZE_MULTIPLE = 64  # of H and I


def decode_experts(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    layout: str = "auto",
    config: Any = None,
    out_dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """Computes out[t] = sum over k of w[t,k] * down_e(silu(gate_e x_t) * up_e x_t), e = ids[t,k].

    bf16 in, float32 from the first product to the last sum, rounded once to out_dtype. FP8 weights
    are multiplied as they are: activations are not rounded to FP8. The same
    input gives the same bits, and in a batch of T tokens a token's bits depend neither on its
    neighbours nor on its place. What holds across T is up to `layout`:

    - "auto", the default, is the fastest: it may take another layout or config at another T, and
      with it other bits.
    - "invariant" gives a token the same bits at every T: one order of sums for a shape and device,
      the one with the least total time over the measured T, in whichever of its layouts is the
      fastest at this T. Another table, or another device, may have another.
    - a layout's name: the same bits at every T, on a GPU with any config.

    Calls on one device must follow one another, as XLA has them by default; mosaic/grid_sync.py
    says why.

    Args:
      x: [T, H] bfloat16.
      weights: gate_up [E, 2, I, H] and down [E, H, I]: bfloat16, H and I multiples of 64; or both
        BlockScaledFp8 in blocks of 128 x 128, H and I multiples of 128.
      expert_ids: [T, K] int32, K <= E. An id outside [0, E) is padding: it contributes nothing,
        whatever stands in its routing weight or in x, and no expert's weights are read for it.
      expert_weights: [T, K] float32.
      layout: "auto" or "invariant" (choose_layout says what they take), or a layout's name:
        "output_major", "expert_major".
      config: the layout's Config; None takes what choose_layout says, or for a layout that is
        named its default for these sizes.
      out_dtype: bfloat16 or float32; None means x.dtype.
      interpret: True runs the kernels in Pallas's interpret mode, on a CPU; an InterpretGPUParams
        does too, with its own options. The interpreter's callbacks can wait for each other for ever
        under asynchronous dispatch: first set jax.config's jax_cpu_enable_async_dispatch to False.
        Bits may depend on T there: a CPU adds up a product of another width in another order.

    Returns:
      [T, H] in out_dtype.

    Raises:
      ValueError: a shape, a size, a layout's name or a config does not fit; the message names it.
      TypeError: a dtype or a config's type is not one that is accepted.
      NotImplementedError: float32 weights, scales of other blocks or sizes, a gradient was asked
        for, or the layout has instructions that this GPU has not.
    """
    shapes, T = _check_inputs(x, weights, expert_ids, expert_weights, out_dtype)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    device.check_interpret(interpret)
    if layout in tuple(MODES):
        choice = choose_layout(device.device_kind(), shapes, T, layout)
        layout, config = choice.layout, choice.config if config is None else config
    if layout not in tuple(LAYOUTS):
        accepted = f"{', '.join(map(repr, MODES))} or one of {sorted(LAYOUTS)}"
        raise ValueError(f"layout is {layout!r}; expected {accepted}")
    chosen = LAYOUTS[layout]
    others = {name: other.capabilities for name, other in LAYOUTS.items()}
    device.expect_capability(f"layout {layout!r}", chosen.capabilities, others, interpret)
    if config is None:
        config = chosen.default_config(shapes, T)
    if not isinstance(config, chosen.Config):
        raise TypeError(f"config is {config!r}; layout {layout!r} takes a {chosen.Config.__name__}")
    chosen.check(config, shapes)
    run = functools.partial(chosen.run, config=config, out_dtype=out_dtype, interpret=interpret)
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


def _check_weight(name: str, weight: Weight, letters: str) -> None:
    """Checks a weight's format, dtypes and number of dimensions."""
    if not isinstance(weight, BlockScaledFp8):
        expect_array(name, weight, letters, jnp.bfloat16)
        return
    expect_array(f"{name}.values", weight.values, letters, VALUES_DTYPE)
    check_block_scaled_fp8(name, weight)


def _check_scale_blocks(weights: ExpertWeights, H: int, I: int) -> None:
    """Raises a NotImplementedError for blocks or sizes that the kernels do not take."""
    for name, weight in (("gate_up", weights.gate_up), ("down", weights.down)):
        if not isinstance(weight, BlockScaledFp8):
            raise TypeError(
                f"weights.{name} is {weight.dtype}; expected BlockScaledFp8, as the other weight is"
            )
        if weight.block != BLOCK:
            raise NotImplementedError(
                f"weights.{name} has blocks of {weight.block}; the kernels take {BLOCK}, "
                "reference_experts takes any"
            )
    for letter, size in (("H", H), ("I", I)):
        if size % BLOCK[1]:
            raise NotImplementedError(
                f"{letter} is {size}; with FP8 weights the kernels take multiples of {BLOCK[1]}, "
                "reference_experts and dequantised weights any"
            )


def _check_inputs(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    out_dtype,
) -> tuple[ExpertShapes, int]:
    """Returns the layer's sizes and T, or raises ValueError, TypeError or NotImplementedError."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights is a {type(weights).__name__}; expected an ExpertWeights")
    expect_array("x", x, "[T, H]", jnp.bfloat16)
    _check_weight("weights.gate_up", weights.gate_up, "[E, 2, I, H]")
    _check_weight("weights.down", weights.down, "[E, H, I]")
    expect_array("expert_ids", expert_ids, "[T, K]", jnp.int32)
    expect_array("expert_weights", expert_weights, "[T, K]", jnp.float32)
    if out_dtype not in (None, jnp.bfloat16, jnp.float32):
        raise TypeError(f"out_dtype is {out_dtype!r}; expected bfloat16 or float32")

    T, H = x.shape
    K = expert_ids.shape[1]
    E, _, I, _ = weights.gate_up.shape
    expected = {
        "weights.gate_up": (weights.gate_up, "[E, 2, I, H]", (E, 2, I, H)),
        "weights.down": (weights.down, "[E, H, I]", (E, H, I)),
        "expert_ids": (expert_ids, "[T, K]", (T, K)),
        "expert_weights": (expert_weights, "[T, K]", (T, K)),
    }
    for name, (value, letters, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {letters} = {shape}")
    if K > E:
        raise ValueError(f"expert_ids has K = {K} experts a token; expected at most E = {E}")
    for letter, size in (("H", H), ("I", I)):
        if size % SIZE_MULTIPLE:
            raise ValueError(f"{letter} is {size}; expected a multiple of {SIZE_MULTIPLE}")
    if weights.quantised:
        _check_scale_blocks(weights, H, I)
    return ExpertShapes(E=E, K=K, H=H, I=I, weights="fp8" if weights.quantised else "bf16"), T
