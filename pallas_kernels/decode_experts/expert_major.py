"""The expert-major layout (the conventional path): tiles of N tokens, each with one expert.

    tiles     an expert's tokens, gathered side by side                    (gather.py)
              or, up to 8 tokens, the whole batch for each expert          (token_tiles.py)
    gate/up   block (tile, some neurons)      hidden[c] = silu(gate_e x[c]) * up_e x[c] * w[c]
    down      block (tile, block_m neurons)   outputs[p] = down_e hidden[c]    column c is row p's
    combine   out[t] = sum over k, in order, of outputs[row_of[t, k]]          (XLA)

What one thread block of gate/up or down does is in expert_major_kernels.py. Both are one fused grid
or two launches, whichever was faster for such tiles. An expert's weights are read once for each of
its tiles: once, unless more than N tokens chose it. Blocks on one expert's tiles are neighbours, so
that further reads may hit L2.

A few tokens are too few rows for the tensor cores' M = 64, so each product is turned around
("swap-AB"): weight rows are M, the tile's N tokens are columns, results come out transposed.

The tensor cores want bf16, and rounding hidden to bf16 would add an error as large as the output's
own rounding. So hidden is kept in split bf16, a high and a low half with 16 bits of mantissa
between them. A tile has 2 N rows of the intermediate, and 2 N columns of one product whose halves
are added in float32.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.configs import Layout
from pallas_kernels.decode_experts.expert_major_config import (
    ExpertMajorConfig,
    check_config,
    config_candidates,
    default_config,
    default_fused,
)
from pallas_kernels.decode_experts.expert_major_fp8 import FP8_MAX_BLOCK_N, fp8_products
from pallas_kernels.decode_experts.expert_major_kernels import Down, GateUp, fit_stages
from pallas_kernels.decode_experts.expert_schedule import ExpertSchedule, default_block_n
from pallas_kernels.decode_experts.gather import MAX_ASSIGNMENTS, gather_by_kernel, gather_by_xla
from pallas_kernels.decode_experts.swiglu_epilogue import product_rows
from pallas_kernels.decode_experts.token_tiles import TokenTiles, WholeBatchTiles
from pallas_kernels.decode_experts.weights import ExpertWeights
from pallas_kernels.mosaic.device import HOPPER, launch
from pallas_kernels.mosaic.grid_sync import signal, wait, zeroed_counters
from pallas_kernels.row_sums import sum_rows


@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "interpret"))
def _run(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    config: ExpertMajorConfig,
    out_dtype,
    interpret,
) -> jax.Array:
    """Runs all launches and combines, on checked inputs; shapes as in decode_experts."""
    E, _, I, H = weights.gate_up.shape
    T, K = expert_ids.shape
    block_n = config.block_n or default_block_n(T, K, E)
    products, stored = _products, weights.as_rows()
    if weights.quantised:
        products, stored = fp8_products, weights.as_halves()
        block_n = min(block_n, FP8_MAX_BLOCK_N)
    tiles = _tiles(x, expert_ids, expert_weights, E, block_n, interpret)
    gate_up, down = products(tiles, H, I, config)
    fused = config.fused
    if fused is None:
        fused = default_fused(tiles.N, not isinstance(tiles, WholeBatchTiles), I)
    if fused:
        outputs = _fused(
            gate_up, down, *tiles.operands, stored.gate_up, stored.down, interpret=interpret
        )
    else:
        hidden = _launch(gate_up, "gate_up", (*tiles.operands, stored.gate_up), interpret)
        outputs = _launch(down, "down", (tiles.operands[0], hidden, stored.down), interpret)
    return sum_rows(outputs, tiles.row_of).astype(out_dtype)


def _tiles(x, expert_ids, expert_weights, E: int, block_n: int, interpret) -> TokenTiles:
    """The batch as it is, or gathered in one launch, or by XLA."""
    T, K = expert_ids.shape
    if WholeBatchTiles.fit(T, K):
        return WholeBatchTiles(x=x, expert_ids=expert_ids, expert_weights=expert_weights, E=E)
    schedule = ExpertSchedule(T=T, K=K, E=E, block_n=block_n)
    if T * K <= MAX_ASSIGNMENTS:
        return gather_by_kernel(x, expert_ids, expert_weights, schedule, interpret)
    return gather_by_xla(x, expert_ids, expert_weights, schedule)


def _products(tiles: TokenTiles, H: int, I: int, config: ExpertMajorConfig) -> tuple[GateUp, Down]:
    block_m, N, neurons = config.down_block_m, tiles.N, config.gate_up_neurons
    rows = product_rows(neurons) + N
    block_k, num_stages = fit_stages(config.gate_up_block_k, config.gate_up_num_stages, rows)
    gate_up = GateUp(tiles=tiles, H=H, I=I, block_k=block_k, num_stages=num_stages, neurons=neurons)
    block_k, num_stages = fit_stages(config.down_block_k, config.down_num_stages, block_m + 2 * N)
    down = Down(tiles=tiles, H=H, I=I, block_m=block_m, block_k=block_k, num_stages=num_stages)
    return gate_up, down


def _launch(product: GateUp | Down, name: str, operands, interpret) -> jax.Array:
    """All blocks of a product; returns what they write."""
    return launch(
        product.run,
        name=f"expert_major_{name}",
        num_blocks=product.num_blocks,
        out_type=product.out_type,
        scratch_types=[plgpu.RefUnion(*product.shared_types()), product.full_type()],
        interpret=interpret,
    )(*operands)


def _fused(gate_up: GateUp, down: Down, *operands, interpret) -> jax.Array:
    """Both products' blocks in one grid, gate/up first, so that no core waits in between.

    When a block of `down` waits for the hidden of its tile, the blocks that make it are at work or
    done, because they have lower numbers and wait for no other (mosaic/grid_sync.py).
    """
    tiles = gate_up.tiles
    num_gate_up = len(gate_up.shared_types())

    def kernel(
        block_id, table, weight_of, x, gate_up_gmem, down_gmem, counters, hidden, outputs,
        shared, gate_up_full, down_full,
    ):  # fmt: skip
        num_used = tiles.num_used(table)

        def signal_tile(tile):
            signal(counters, tile)

        def wait_for_tile(tile):
            wait(counters, tile, gate_up.blocks_per_tile, down.blocks_per_tile)

        @pl.when(block_id < num_used * gate_up.blocks_per_tile)
        def _():
            gate_up.run(
                block_id, table, weight_of, x, gate_up_gmem, hidden,
                shared[:num_gate_up], gate_up_full, signal_tile,
            )  # fmt: skip

        block_id -= num_used * gate_up.blocks_per_tile

        @pl.when((block_id >= 0) & (block_id < num_used * down.blocks_per_tile))
        def _():
            down.run(
                block_id, table, hidden, down_gmem, outputs, shared[num_gate_up:], down_full,
                wait_for_tile,
            )  # fmt: skip

    @jax.custom_batching.sequential_vmap  # the counters are for one call at a time
    def call(*operands):
        return launch(
            kernel,
            name="expert_major",
            num_blocks=gate_up.num_blocks + down.num_blocks,
            out_type=(gate_up.out_type, down.out_type),
            scratch_types=[
                plgpu.RefUnion(*gate_up.shared_types(), *down.shared_types()),
                gate_up.full_type(),
                down.full_type(),
            ],
            interpret=interpret,
        )(*operands, zeroed_counters(tiles.num_tiles))

    return call(*operands)[1]


EXPERT_MAJOR = Layout(
    name="expert_major",
    capabilities=(HOPPER,),  # wgmma
    # Every sum is one accumulator's, over a row of weights in ascending order of its columns,
    # whatever the tiles are.
    sum_order="by_expert",
    Config=ExpertMajorConfig,
    default_config=default_config,
    candidates=config_candidates,
    check=check_config,
    run=_run,
)
