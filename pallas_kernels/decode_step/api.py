"""decode_layers: one new token of each row through whole decoder layers, in few launches."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_step.input_checks import INSTEAD, check_config, check_layers
from pallas_kernels.decode_step.launches import launch_layer, num_parts, with_mailboxes
from pallas_kernels.decode_step.layer import LayerConfig, default_config
from pallas_kernels.decode_step.layer_arrays import (
    LayerShard,
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
)
from pallas_kernels.mosaic import device

# How a layer is cut into grids; beyond 8 rows the experts are launches of their own.
LAUNCHES = ("layer", "blocks")


def decode_layer(
    residual: Residual,
    weights: LayerWeights,
    keys: jax.Array,
    values: jax.Array,
    positions: RowPositions,
    **options: Any,
) -> LayerStep:
    """decode_layers of one layer; keys and values are its cache, options the keywords there."""
    (step,) = decode_layers(residual, (weights,), ((keys, values),), positions, **options)
    return step


def decode_layers(
    residual: Residual,
    weights: Sequence[LayerWeights],
    caches: Sequence[tuple[jax.Array, jax.Array]],
    positions: RowPositions,
    *,
    K: int,
    eps: float,
    norm_topk_prob: bool = True,
    launches: str = "layer",
    config: LayerConfig | None = None,
    shard: LayerShard | None = None,
    interpret: Any = False,
) -> list[LayerStep]:
    """Computes x + attention(norm(x)), then + experts(norm(x)), for one new token of each row.

    One layer after the other, all of the same sizes and formats.

    Accumulates in float32 from each product to the next operand of the tensor cores, which is
    bfloat16. A row's bits depend on its own tokens alone: not on its neighbours, nor up to 8 rows
    on how many there are.

    Args:
      residual: x with what is yet to be added; at most 64 rows.
      weights: each layer's.
      caches: (keys, values) of each layer, [B, kv, C, D] bfloat16, after RoPE; token p of a row is
        in slot p mod C, and C is a multiple of 64. They change in place if the caller donates them.
      positions: where the tokens stand.
      K: experts a token.
      eps: of all RMSNorms.
      norm_topk_prob: whether the K weights are divided by their sum.
      launches: "layer", one grid up to 8 rows; or "blocks", one for attention and the router's
        product, one for top-k and the experts.
      config: None takes default_config of B and of the experts' format.
      shard: the part of each layer that weights and caches hold; None for all of it. It is one grid
        where all of it would be, but the router's tasks are another where heads are split, and then
        the experts are launches of their own. The result is the whole layer's on each device, but
        for the caches.
      interpret: as in decode_experts.

    Returns:
      Each layer's step.

    Raises:
      ValueError: a shape or a number does not fit, or a layer is unlike the first; the message
        names it.
      TypeError: a dtype is not one that is accepted.
      NotImplementedError: a size that the kernels lack, or the GPU is not a Hopper.
    """
    steps, _ = _checked_run(
        residual, weights, caches, positions, K, eps, norm_topk_prob, launches, config, shard,
        interpret,
    )  # fmt: skip
    return steps


def stamp_layers(
    residual: Residual,
    weights: Sequence[LayerWeights],
    caches: Sequence[tuple[jax.Array, jax.Array]],
    positions: RowPositions,
    *,
    K: int,
    eps: float,
    norm_topk_prob: bool = True,
    launches: str = "layer",
    config: LayerConfig | None = None,
) -> tuple[list[LayerStep], list[dict[str, dict[str, jax.Array]]]]:
    """decode_layers, and when each thread block of each task began, had waited and ended.

    Arguments as decode_layers'.

    Returns:
      What decode_layers returns, and for each layer, grid and kind of task in it the [blocks, 4]
      int32 of mosaic.stamps.
    """
    return _checked_run(
        residual, weights, caches, positions, K, eps, norm_topk_prob, launches, config, None,
        stamped=True,
    )  # fmt: skip


def _checked_run(
    residual, weights, caches, positions, K, eps, norm_topk_prob, launches, config, shard,
    interpret=False, stamped=False,
) -> tuple[list[LayerStep], list[dict[str, dict[str, jax.Array]]]]:  # fmt: skip
    device.check_interpret(interpret)
    if launches not in LAUNCHES:
        raise ValueError(f"launches is {launches!r}; expected one of {list(LAUNCHES)}")
    weights, caches = tuple(weights), tuple(map(tuple, caches))
    s = check_layers(residual, weights, caches, positions, K, eps, norm_topk_prob, shard)
    quantised = "experts" in s.fp8
    config = default_config(s.B, quantised) if config is None else config
    check_config(config, quantised)
    device.expect_capability("decode_layer", (device.HOPPER,), {INSTEAD: device.ANY}, interpret)
    return _run(
        residual, weights, caches, positions, shard, stamped=stamped, shapes=s, launches=launches,
        config=config, interpret=interpret,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("stamped", "shapes", "launches", "config", "interpret")
)
def _run(
    residual, weights, caches, positions, shard, *, stamped: bool, **options
) -> tuple[list[LayerStep], list[dict[str, dict[str, jax.Array]]]]:
    """All layers; options as launch_layer's."""
    if residual.parts is None:
        # Zeros, so that the first layer has the grid of the others: one to lower, not two.
        s = options["shapes"]
        nothing = jnp.zeros((num_parts(s, shard), s.N, s.H), jnp.float32)
        residual = residual._replace(parts=nothing)
    residual = with_mailboxes(residual, weights[0], shard, **options)  # each layer hands them on
    steps, stamps = [], []
    for index, (own, cache) in enumerate(zip(weights, caches, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            step, times = launch_layer(
                residual, own, cache, positions, shard, stamped=stamped, **options
            )
        residual = step.residual
        steps.append(step)
        stamps.append(times)
    # A layer whose mailboxes nothing reads would be traced without them, and lowered by itself.
    steps[-1] = step._replace(residual=lax.optimization_barrier(residual))
    return steps, stamps
