"""All layers on a mesh: one function on every device, which says itself what moves between them.

    attention       its own rows and, with split_heads, heads; then o's products are added up over
                    tensor
    router          its own rows; on every device along tensor alike
    experts         moe_jax/experts/exchange.py
    parameters      where fsdp splits them, a layer gathers its own over data when it begins

The embedding is in here too, because its table may be split over the vocabulary. What follows the
layers, the norm, the head and the losses, is left to the compiler: it sees whole arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe_jax.integers import at_least_int32
from moe_jax.layers import LinearParams, embed, linear
from moe_jax.parallelism import Parallelism
from moe_jax.sharding import axes_of
from pallas_kernels.block_scaled_fp8 import BlockScaledFp8, is_fp8

# Weights that a layer gathered: the backward pass gathers them anew, because kept ones would be
# the whole model on each device.
GATHERED = "gathered"


def run_on_mesh(run: Callable, parallelism: Parallelism, phase: str, *arguments: Any) -> Any:
    """All layers on each device of a mesh.

    Args:
      run: decoder.run_layers with its options, or what does the same.
      parallelism: of these options.
      phase: likewise.
      arguments: its arrays, whole: params, x, positions, caches, replay.

    Returns:
      What run_layers returns, whole.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    params, x, positions, caches, replay = arguments
    rows = parallelism.rows(phase, x.shape[0])
    by_rows = PartitionSpec(rows or None)
    cache = PartitionSpec(rows or None, "tensor" if parallelism.split_heads else None)
    every = PartitionSpec()

    def of_positions(array: jax.Array) -> PartitionSpec:
        return by_rows if array.shape[0] == x.shape[0] else every  # RoPE's tables may have one row

    in_specs = (
        parameter_specs(params, parallelism),
        by_rows,
        jax.tree.map(of_positions, positions),
        jax.tree.map(lambda _: cache, caches),
        jax.tree.map(lambda _: PartitionSpec(None, rows or None), replay),
    )
    out_specs = (by_rows, None if caches is None else cache, by_rows)
    # check_vma is off because neither Pallas kernels nor all of lax say over which axes a result
    # varies; the tests compare every gradient with one device's instead.
    mapped = jax.shard_map(
        run, mesh=parallelism.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(*arguments)


def parameter_specs(params: Any, parallelism: Parallelism) -> Any:
    """PARTITION's line for each array of the layers' parameters, by the names in its paths.

    Raises:
      ValueError: the mesh does not divide a dimension, or cuts through a block of FP8 weights.
    """

    def spec(path: tuple, weight: Any) -> Any:
        name = f"layers{_name(path)}"
        if not is_fp8(weight):
            return parallelism.spec(name, weight.shape)
        values = parallelism.spec(name, weight.shape, fsdp=False)
        scales = weight.scales.shape
        for dimension, axis in enumerate(values):
            if axis is not None and not _whole_blocks(weight, dimension, parallelism.size(axis)):
                raise ValueError(
                    f"{name} has {weight.shape[dimension]} in dimension {dimension}, in FP8 blocks "
                    f"of {weight.block}, {scales[dimension]} of them; expected whole blocks on "
                    f"each of {parallelism.size(axis)} devices along the mesh's axis {axis!r}"
                )
        return dataclasses.replace(weight, values=values, scales=values)

    return jax.tree.map_with_path(spec, params, is_leaf=is_fp8)


def _whole_blocks(weight: BlockScaledFp8, dimension: int, size: int) -> bool:
    """Whether `size` devices get whole blocks each."""
    place = dimension - len(weight.shape)  # -2 and -1 are in blocks, what is before them is not
    block = weight.block[place] if place >= -2 else 1
    return weight.shape[dimension] % (size * block) == 0


def _name(path: tuple) -> str:
    return "".join(f".{key.name if hasattr(key, 'name') else key.idx}" for key in path)


def gathered(params: Any, parallelism: Parallelism | None) -> Any:
    """A layer's parameters, whole over data; as they are where nothing is split over it."""
    if parallelism is None or not parallelism.splits_parameters:
        return params

    def whole(path: tuple, weight: Any) -> Any:
        axes = axes_of(_name(path))
        if is_fp8(weight) or "data" not in axes:
            return weight
        weight = lax.all_gather(weight, "data", axis=axes.index("data"), tiled=True)
        return checkpoint_name(weight, GATHERED)

    return jax.tree.map_with_path(whole, params, is_leaf=is_fp8)


def rematerialised(run_layer: Callable, remat: bool, parallelism: Parallelism | None) -> Callable:
    """run_layer with a backward pass that keeps less: its input alone, or all but gathered weights.

    Without remat it is run_layer, unless parameters are gathered.
    """
    if remat:
        return jax.checkpoint(run_layer)
    if parallelism is None or not parallelism.splits_parameters:
        return run_layer
    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return jax.checkpoint(run_layer, policy=policy)


def summed(x: jax.Array, parallelism: Parallelism | None, *axes: str) -> jax.Array:
    """The sum of x over axes of the mesh; x itself without a mesh."""
    axes = [] if parallelism is None else [axis for axis in axes if parallelism.size(axis) > 1]
    return lax.psum(x, tuple(axes)) if axes else x


def linear_of_split(x: jax.Array, params: LinearParams, parallelism: Parallelism | None):
    """`linear` of attention's output: where heads are split, x and weight hold some columns each.

    The bias is added once.
    """
    if parallelism is None or not parallelism.split_heads:
        return linear(x, *params)
    y = summed(linear(x, params.weight), parallelism, "tensor")
    return y if params.bias is None else (y + params.bias).astype(y.dtype)


def embed_on_mesh(
    ids: jax.Array, table: jax.Array, parallelism: Parallelism, phase: str
) -> jax.Array:
    """`embed` of ids [B, S] with a table [V, H] that may be split over the vocabulary and H.

    A device looks up the tokens that its rows of the table have; the sum over tensor has them all.
    """
    V = table.shape[0]
    rows = PartitionSpec(parallelism.rows(phase, ids.shape[0]) or None)
    spec = parallelism.spec("embed_tokens.weight", table.shape)
    if "tensor" not in spec:
        return embed(ids, jax.lax.with_sharding_constraint(table, parallelism.sharding()))

    def look_up(ids: jax.Array, table: jax.Array) -> jax.Array:
        if "data" in spec:
            table = lax.all_gather(table, "data", axis=1, tiled=True)
        first = lax.axis_index("tensor") * table.shape[0]
        own = (ids >= first) & (ids < first + table.shape[0])
        found = jnp.take(table, jnp.where(own, ids - first, 0), axis=0)
        found = lax.psum(jnp.where(own[..., None], found, 0), "tensor")
        return jnp.where(((ids >= 0) & (ids < V))[..., None], found, jnp.nan)

    mapped = functools.partial(jax.shard_map, mesh=parallelism.mesh, check_vma=False)
    return mapped(look_up, in_specs=(rows, spec), out_specs=rows)(at_least_int32(ids), table)


def head_of(head: jax.Array, parallelism: Parallelism | None) -> jax.Array:
    """The head [V, H] as its product needs it: whole over data, split over the vocabulary."""
    if parallelism is None:
        return head
    spec = parallelism.spec("lm_head.weight", head.shape, fsdp=False)
    return jax.lax.with_sharding_constraint(head, parallelism.sharding(*spec))
