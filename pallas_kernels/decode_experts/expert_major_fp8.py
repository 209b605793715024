"""The two products of expert_major with FP8 weights, as one thread block of each does them.

They read the same tiles and write the same outputs as those of expert_major_kernels.py. The
intermediate stays float32 between them: down's blocks split it in two f16 terms as they read it.
Lanes load tokens and store results by themselves, so the copy engine reads weights alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import BLOCK
from pallas_kernels.decode_experts.expert_major_kernels import (
    Down,
    GateUp,
    nothing,
    tile_and_part,
)
from pallas_kernels.decode_experts.token_tiles import TokenTiles
from pallas_kernels.decode_experts.weights import down_rows, gate_and_up_rows
from pallas_kernels.mosaic.device import SHARED_MEMORY_BYTES
from pallas_kernels.mosaic.fp8_mma import GROUP, TOKENS, store_column
from pallas_kernels.mosaic.fp8_operand import COLUMNS
from pallas_kernels.mosaic.fp8_product import Fp8Product
from pallas_kernels.mosaic.grid_sync import staggered_start
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.pipeline import prologue

FP8_BLOCK_KS = (128, 256)  # whole scale blocks, up to the widest TMA box
FP8_MAX_BLOCK_N = 32  # with more, down's two terms would not fit in registers


def fp8_products(tiles: TokenTiles, H: int, I: int, config: Any) -> tuple["GateUpFp8", "DownFp8"]:
    """Both products of an ExpertMajorConfig, with stages cut so that two blocks fit on a core."""
    gate_up = GateUpFp8(
        tiles=tiles,
        H=H,
        I=I,
        neurons=config.gate_up_neurons,
        block_k=config.gate_up_block_k,
        num_stages=config.gate_up_num_stages,
    )
    down = DownFp8(
        tiles=tiles,
        H=H,
        I=I,
        block_m=config.down_block_m,
        block_k=config.down_block_k,
        num_stages=config.down_num_stages,
    )
    return _fitted(gate_up), _fitted(down)


def fp8_stage_bytes(config: Any) -> dict[str, int]:
    """Of weights, by the field that says how many there are."""
    rows, columns = 2 * config.gate_up_neurons, config.gate_up_block_k
    return {
        "gate_up_num_stages": columns * rows,
        "down_num_stages": config.down_block_k * config.down_block_m,
    }


def _fitted(work):
    """`work` with half its columns a stage, and fewer stages, where two would not fit on a core."""
    room = SHARED_MEMORY_BYTES // 2
    while True:
        product = work.product
        stages = (room - product.fixed_bytes) // product.stage_bytes
        if stages >= 2 or work.block_k == COLUMNS:
            return dataclasses.replace(work, num_stages=max(2, min(work.num_stages, stages)))
        work = dataclasses.replace(work, block_k=work.block_k // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateUpFp8(GateUp):
    """Block (tile, some neurons): hidden = silu(gate_e x) * up_e x * weight of the tile's columns.

    Hidden is [tiles * N, I] float32. `neurons` is 32 or 64; steps_at_once is Fp8Product's.
    """

    steps_at_once: int = 1

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tiles.num_tiles * self.tiles.N, self.I), jnp.float32)

    @property
    def product(self) -> Fp8Product:
        return Fp8Product(
            rows=2 * self.neurons,
            columns=self.H,
            N=self.tiles.N,
            T=self.tiles.num_columns,
            block_k=self.block_k,
            num_stages=self.num_stages,
            dtype=jnp.bfloat16,
            scale_rows=2,
            steps_at_once=self.steps_at_once,
        )

    def shared_types(self) -> tuple:
        return (self.product.shared_types(),)

    def full_type(self):
        return plgpu.Barrier(num_arrivals=1, num_barriers=self.num_stages)

    def run(
        self, block_id, table, weight_of, x, gate_up, hidden, shared, full,
        signal: Callable[[Any], None] = nothing,
    ) -> None:  # fmt: skip
        """All of one block: `hidden` is what it writes; then it calls signal(its tile's index).

        `gate_up` has values [E * 2, I, H] and scales [E * 2 * I / 128, H / 128].
        """
        N, block_k, product = self.tiles.N, self.block_k, self.product
        values, scales = gate_up.values, gate_up.scales
        (shared,) = shared
        index, part = tile_and_part(block_id, self.blocks_per_tile)
        tile = self.tiles.lookup(table, index)

        def multiply():
            halves, neurons = pl.ds(2 * tile.expert, 2), pl.ds(part * self.neurons, self.neurons)

            def load(step, stage):
                piece = values.at[halves, neurons, pl.ds(step * block_k, block_k)]
                copy_evict_first(piece, shared[0].at[stage], full.at[stage], by_one_lane=True)

            staggered_start(block_id, self.num_blocks, 2 * self.neurons * self.H)
            prologue(product.num_steps, self.num_stages, load)
            first_rows = gate_and_up_rows(tile.expert, part, self.neurons, self.I)
            product.start_scales(shared, [scales.at[lax.div(row, BLOCK[0])] for row in first_rows])
            tokens = x.at[pl.ds(tile.first_row, product.T)]
            valid = self.tiles.valid_columns(tile)
            loaded = product.load_tokens(tokens, valid)
            weights = self.tiles.load_weights(weight_of, tile, TOKENS)
            totals = product.multiply(shared, full, load, tokens, valid, loaded)
            weights = lax.broadcast_in_dim(weights, (GROUP, N), (1,))
            groups = self.neurons // GROUP
            results = [
                gate / (1 + jnp.exp(-gate)) * up * weights  # [GROUP, N]
                for gate, up in zip(totals[:groups], totals[groups:], strict=True)
            ]

            def store(column, _):
                store_column(results, column, hidden.at[pl.ds(index * N + column, 1), neurons])

            self.tiles.for_each_valid(tile, store)
            signal(index)

        pl.when(tile.expert >= 0)(multiply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownFp8(Down):
    """Block (tile, block_m neurons): row p of outputs = down_e hidden, of p's column.

    Outputs are [num_outputs, H] float32. The rows of no column stay unwritten.
    steps_at_once is Fp8Product's.
    """

    steps_at_once: int = 1

    @property
    def product(self) -> Fp8Product:
        return Fp8Product(
            rows=self.block_m,
            columns=self.I,
            N=self.tiles.N,
            T=self.tiles.num_columns,
            block_k=self.block_k,
            num_stages=self.num_stages,
            dtype=jnp.float32,
            steps_at_once=self.steps_at_once,
        )

    def shared_types(self) -> tuple:
        return (self.product.shared_types(),)

    def full_type(self):
        return plgpu.Barrier(num_arrivals=1, num_barriers=self.num_stages)

    def run(
        self, block_id, table, hidden, down, outputs, shared, full,
        wait: Callable[[Any], None] = nothing,
    ) -> None:  # fmt: skip
        """All of one block: `outputs` is what it writes.

        Once wait(its tile's index) returns, hidden may be read. `down` has values [E * H, I] and
        scales [E * H / 128, I / 128].
        """
        N, block_k, product = self.tiles.N, self.block_k, self.product
        values, scales = down.values, down.scales
        (shared,) = shared
        index, part = tile_and_part(block_id, self.blocks_per_tile)
        tile = self.tiles.lookup(table, index)

        def multiply():
            first_row = down_rows(tile.expert, part, self.block_m, self.H)

            def load(step, stage):
                piece = values.at[pl.ds(first_row, self.block_m), pl.ds(step * block_k, block_k)]
                to = shared[0].at[stage, 0]
                copy_evict_first(piece, to, full.at[stage], by_one_lane=True)

            # Weights depend on no other block, so they are on their way before the wait.
            prologue(product.num_steps, self.num_stages, load)
            product.start_scales(shared, [scales.at[lax.div(first_row, BLOCK[0])]])
            wait(index)
            tokens = hidden.at[pl.ds(index * N, product.T)]
            valid = self.tiles.valid_columns(tile)
            loaded = product.load_tokens(tokens, valid)
            totals = product.multiply(shared, full, load, tokens, valid, loaded)
            neurons = pl.ds(part * self.block_m, self.block_m)

            def store(column, row):
                store_column(totals, column, outputs.at[pl.ds(row, 1), neurons])

            self.tiles.for_each_valid(tile, store)

        pl.when(tile.expert >= 0)(multiply)
