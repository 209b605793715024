"""What an op's operands are: dtypes and shapes as callers give them, tiles as wgmma reads them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import interpreting

# A TMA box has at most 256 elements a side.
MAX_BOX = 256

# How wgmma operands lie in shared memory: 8 x 64 tiles of bf16 under the 128-byte swizzle.
WGMMA_TILING = plgpu.TilingTransform((8, 64))
SWIZZLE = plgpu.SwizzleTransform(128)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def wgmma_operand(*shape: int) -> Any:
    """Shared memory of bf16 from which the tensor cores read; its last two dimensions are tiled."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(WGMMA_TILING, SWIZZLE))


def ragged_wgmma_operand(num_stages: int, rows: int) -> Any:
    """wgmma_operand of 64 columns for an array of any number of rows, see copy_ragged_rows.

    Pallas lets nothing be copied into tiles from an array whose last tile is not whole. Tiles here
    are as wide as the operand, so rows lie the same without them: the copy is made without, and
    wgmma reads with them.

    Returns:
      A RefUnion of (what wgmma reads, what is copied to), both [num_stages, rows, 64] bf16.
    """
    shape = (num_stages, rows, WGMMA_TILING.tiling[1])
    untiled = plgpu.SMEM(shape, jnp.bfloat16, transforms=(SWIZZLE,))
    return plgpu.RefUnion(wgmma_operand(*shape), untiled)


def copy_ragged_rows(source: Any, columns: Any, operand: Any, stage: Any, full: Any) -> None:
    """Starts to copy all rows of some columns to a stage; rows past the array's end are zeros.

    Args:
      source: [at most `rows`, ...] bf16 in global memory.
      columns: a pl.ds of 64 columns, whose start is traced.
      operand: see ragged_wgmma_operand.
      stage: of the operand.
      full: the stage's barrier.
    """
    tiled, untiled = operand
    # The interpreter keeps the members of a union apart, and copies into tiles whatever their rows.
    destination = tiled if interpreting() else untiled
    first = 0 * columns.start  # not a plain 0, because Pallas would check the array's bounds
    piece = source.at[pl.ds(first, tiled.shape[1]), columns]
    plgpu.copy_gmem_to_smem(piece, destination.at[stage], full)


def expect_array(
    name: str, value, letters: str, dtype, *, instead: str = "reference_experts"
) -> None:
    """Checks an argument's own shape and dtype, before JAX would convert anything.

    Args:
      name: the argument, as the caller knows it.
      value: a jax or numpy array.
      letters: its shape in letters, as "[T, K]"; every size is at least 1.
      dtype: what is accepted.
      instead: the function that takes any float dtype, for the message.

    Raises:
      TypeError: it is no array, or of another dtype.
      ValueError: it has another number of dimensions, or a size of 0.
      NotImplementedError: another float dtype where bfloat16 is taken.
    """
    dtype = np.dtype(dtype)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        kind = type(value).__name__
        raise TypeError(f"{name} is a {kind}; expected a {dtype.name} array {letters}")
    if len(value.shape) != letters.count(",") + 1 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {value.shape}; expected {letters}, every size at least 1"
        )
    if value.dtype == dtype:
        return
    if dtype == jnp.bfloat16 and jnp.issubdtype(value.dtype, jnp.floating):
        raise NotImplementedError(
            f"{name} has dtype {value.dtype.name}; the kernels take bfloat16, "
            f"{instead} takes any float dtype"
        )
    raise TypeError(f"{name} has dtype {value.dtype.name}; expected {dtype.name}")
