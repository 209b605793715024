"""Tiles of matrix products by specialised warpgroups: one loads, the others multiply.

    producer     load 0   load 1   load 2   load 3  | next tile: load 0 ...     waits for `empty`
    consumer 0            wgmma 0   wgmma 1   ...   | epilogue                  waits for `full`
    consumer 1            wgmma 0   wgmma 1   ...   | epilogue

The blocks of a grid stay, and take every num_blocks-th tile. The producer runs ahead over the end
of a tile, so that the next tile's first stages are full when its products begin.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import WARPGROUP

CONSUMERS = 2  # warpgroups that multiply; one more, the producer, loads
NUM_WARPGROUPS = CONSUMERS + 1
# Of a core's 512 registers for each lane of a warpgroup; both are multiples of 8.
_PRODUCER_REGISTERS = 40
_CONSUMER_REGISTERS = 232


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileProduct:
    """What one kind of tile loads, multiplies and stores.

    Attributes:
      num_stages: stages of the pipeline, at least 2.
      acc_shape: of one consumer's accumulator, float32.
      tile: tile(index) -> whatever the other functions want to know of that tile.
      num_steps: num_steps(tile) -> steps along the contraction; may be 0, and the sum is then 0.
      load: load(tile, step, stage, barrier) starts the copies of a step.
      multiply: multiply(acc, stage, consumer) starts one step's wgmma.
      finish: finish(tile, value, consumer) stores an accumulator's value.
      takes_part: takes_part(tile, consumer) says whether a consumer has anything to do.
    """

    num_stages: int
    acc_shape: tuple[int, int]
    tile: Callable[[Any], Any]
    num_steps: Callable[[Any], Any]
    load: Callable[[Any, Any, Any, Any], None]
    multiply: Callable[[Any, Any, Any], None]
    finish: Callable[[Any, jax.Array, Any], None]
    takes_part: Callable[[Any, Any], Any] | None = None


def barrier_types(num_stages: int, copies: int) -> tuple[Any, Any]:
    """Shared memory's barriers `full` and `empty`, one of each for a stage.

    Args:
      num_stages: stages of the pipeline.
      copies: how many copies one call of `load` starts.
    """
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=num_stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=num_stages),
    )


def run_tiles(
    product: TileProduct, block_id: Any, num_blocks: int, num_tiles: Any, full: Any, empty: Any
) -> None:
    """Computes this block's tiles: those whose index is block_id modulo num_blocks.

    Args:
      product: the tiles.
      block_id: of this block.
      num_blocks: in the grid.
      num_tiles: in all, known as the kernel runs.
      full, empty: from barrier_types.
    """
    warpgroup = lax.axis_index(WARPGROUP)
    mine = lax.div(num_tiles - block_id + (num_blocks - 1), jnp.int32(num_blocks))

    def for_each_tile(do: Callable[[Any, Any], Any]) -> None:
        """do(tile, first_step), where steps are counted over all tiles of this block."""

        def body(nth, first_step):
            tile = product.tile(block_id + nth * num_blocks)
            do(tile, first_step)
            return first_step + product.num_steps(tile)

        lax.fori_loop(0, mine, body, jnp.int32(0))

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        for_each_tile(lambda tile, first: _load_tile(product, tile, first, full, empty))
        for stage in range(product.num_stages):  # no barrier is left with a phase unseen
            plgpu.barrier_wait(empty.at[stage])

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        for stage in range(product.num_stages):  # all stages are free
            plgpu.barrier_arrive(empty.at[stage])

        def compute(tile, first):
            def multiply():
                _multiply_tile(product, tile, first, warpgroup, full, empty)

            if product.takes_part is None:
                multiply()
                return
            takes_part = product.takes_part(tile, warpgroup)
            pl.when(takes_part)(multiply)
            pl.when(jnp.logical_not(takes_part))(
                lambda: _pass_over_tile(product, tile, first, full, empty)
            )

        for_each_tile(compute)
        plgpu.wait_smem_to_gmem(0)


def _stage(product: TileProduct, step: Any) -> Any:
    return lax.rem(step, jnp.int32(product.num_stages))


def _load_tile(product, tile, first, full, empty) -> None:
    def body(step, _):
        stage = _stage(product, first + step)
        plgpu.barrier_wait(empty.at[stage])
        product.load(tile, step, stage, full.at[stage])

    lax.fori_loop(0, product.num_steps(tile), body, None)


def _multiply_tile(product, tile, first, consumer, full, empty) -> None:
    """A step's stage is given back one step later, because its wgmma may run until then."""
    num_steps = product.num_steps(tile)

    def multiply(acc):
        def body(step, _):
            stage = _stage(product, first + step)
            plgpu.barrier_wait(full.at[stage])
            product.multiply(acc, stage, consumer)
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(empty.at[_stage(product, first + step - 1)])

        lax.fori_loop(0, num_steps, body, None)
        plgpu.wgmma_wait(0)
        return acc[...]

    value = pl.run_scoped(multiply, plgpu.ACC(product.acc_shape, jnp.float32))

    @pl.when(num_steps > 0)
    def _():
        plgpu.barrier_arrive(empty.at[_stage(product, first + num_steps - 1)])

    product.finish(tile, value, consumer)


def _pass_over_tile(product, tile, first, full, empty) -> None:
    def body(step, _):
        stage = _stage(product, first + step)
        plgpu.barrier_wait(full.at[stage])
        plgpu.barrier_arrive(empty.at[stage])

    lax.fori_loop(0, product.num_steps(tile), body, None)
