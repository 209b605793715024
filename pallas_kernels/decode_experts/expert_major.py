"""The expert-major layout (the conventional path): tiles of N tokens, each with one expert.

    tiles     an expert's tokens, gathered side by side              (gather_rows.py)
              or, up to 8 tokens, the whole batch for each expert    (batch_tiles.py)
    gate/up   program (tile, 32 neurons)   hidden[c] = silu(gate_e x[c]) * up_e x[c] * w[c]
    down      program (tile, R neurons)    outputs[p] = down_e hidden[c]    column c is row p's
    combine   out[t] = sum over k, in order, of outputs[row_of[t, k]]       (XLA)

An expert's weights are read once for each of its tiles: once, unless more than N tokens chose it.
Programs on one expert's tiles are neighbours, so that further reads may hit L2.

A few tokens are too few rows for the tensor cores' M = 64, so each product is turned around
("swap-AB"): weight rows are M, the tile's N tokens are columns, results come out transposed. A
column that is nobody's is multiplied all the same, but not stored: those stores would be most.

The tensor cores want bf16, and rounding hidden to bf16 would add an error as large as the output's
own rounding. So it is kept as hi + lo, two bf16 numbers with 16 bits of mantissa between them: of a
tile 2 N rows of the intermediate, 2 N columns of one product whose halves are added in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.batch_tiles import BatchTiles
from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.gated import NEURONS, OPERAND, ROWS, exchange_type
from pallas_kernels.decode_experts.gather_rows import (
    MOST_ASSIGNMENTS,
    gather_grouped,
    gather_rows,
)
from pallas_kernels.decode_experts.grouping import (
    LARGEST_TOKEN_TILE,
    LEAST_TOKEN_TILE,
    Grouping,
    fitting_token_tile,
    group,
)
from pallas_kernels.decode_experts.tiles import Tiles
from pallas_kernels.decode_experts.token_tiles import TokenTiles
from pallas_kernels.decode_experts.weights import (
    ExpertShapes,
    ExpertWeights,
    down_rows,
    gate_and_up_rows,
)
from pallas_kernels.l2_hints import copy_kept, copy_once
from pallas_kernels.mosaic import SHARED_MEMORY_BYTES, interpret_params, store_rows, tma_ring

CAPABILITIES = (9,)  # wgmma

_TILES = (64, 128)
_COLUMNS = (64, 128, 256)  # a TMA box has at most 256 elements a side

# Every sum is one accumulator's, over a row of weights in ascending order of its columns, whatever
# the tiles are; streamed's as well.
SUM_ORDER = "by_expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How expert_major cuts the work; nothing here changes a bit of a result on a GPU.

    Attributes:
      gate_up_columns: columns of x and gate_up in a ring slot; 64, 128 or 256, divides H.
      gate_up_slots: slots in the gate/up ring. Fewer are used, and half or a quarter of their
        columns, where two programs would not fit on a core otherwise.
      down_rows: R, output neurons of a down program; 64 or 128, divides H.
      down_columns: columns of hidden and down in a ring slot; 64, 128 or 256, divides I.
      down_slots: slots in the down ring, likewise.
      token_tile: N of gathered tiles, a multiple of 8 up to 64; 0 takes fitting_token_tile. A
        Grouping that is passed in has its own N.
    """

    gate_up_columns: int = 256
    gate_up_slots: int = 3
    down_rows: int = 128
    down_columns: int = 128
    down_slots: int = 3
    token_tile: int = 0


def default_config(shapes: ExpertShapes, T: int) -> Config:
    """The heuristic: slots of 32 KB of weights, few enough that two programs share an SM."""
    del T
    return Config(
        gate_up_columns=largest_divisor(shapes.H, _COLUMNS),
        down_rows=largest_divisor(shapes.H, _TILES),
        down_columns=largest_divisor(shapes.I, _TILES),
    )


def candidate_configs(shapes: ExpertShapes, T: int) -> list[Config]:
    """Configs worth measuring, the default first, then what has won before.

    64 rows of output neurons make twice the programs, for few tokens; narrow slots let more
    programs share an SM. A shard's experts get fewer tokens than T and K let expect, since most
    ids are other shards': there narrow tiles may do.
    """
    default = default_config(shapes, T)
    short_down = {"down_rows": 64, "down_slots": 4}
    narrow = {"gate_up_columns": largest_divisor(shapes.H, _TILES), "gate_up_slots": 4}
    changes = [short_down, narrow | short_down]
    if fitting_token_tile(T, shapes.K, shapes.E) > LEAST_TOKEN_TILE:
        changes = [{"token_tile": LEAST_TOKEN_TILE}, *changes]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("gate_up_columns", c.gate_up_columns, _COLUMNS, "H", H)
    check_tile("down_rows", c.down_rows, _TILES, "H", H)
    check_tile("down_columns", c.down_columns, _COLUMNS, "I", I)
    gate_up_slot = _slot_bytes(c.gate_up_columns, ROWS + LEAST_TOKEN_TILE)
    down_slot = _slot_bytes(c.down_columns, c.down_rows + 2 * LEAST_TOKEN_TILE)
    check_slots("gate_up_slots", c.gate_up_slots, gate_up_slot, least=2)
    check_slots("down_slots", c.down_slots, down_slot, least=2)
    tiles = range(0, LARGEST_TOKEN_TILE + 1, LEAST_TOKEN_TILE)
    if isinstance(c.token_tile, bool) or c.token_tile not in tiles:
        raise ValueError(
            f"config.token_tile is {c.token_tile!r}; expected 0 or a multiple of "
            f"{LEAST_TOKEN_TILE} up to {LARGEST_TOKEN_TILE}"
        )


def tile_program(program, num_blocks: int):
    """Which work a program of either launch does: (tile of tokens, block of weight rows).

    Plain integer arithmetic, for Python ints, numpy arrays and traced scalars alike.
    """
    return program // num_blocks, program % num_blocks


@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "interpret"))
def run(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    config: Config,
    out_dtype,
    interpret,
    grouping: Grouping | None = None,
) -> jax.Array:
    """Runs all launches and combines, on checked inputs; shapes as in decode_experts."""
    E, _, I, H = weights.gate_up.shape
    tiles = _tiles(x, expert_ids, expert_weights, E, config.token_tile, interpret, grouping)
    hidden = _gate_up(tiles, weights.gate_up.reshape(E * 2 * I, H), I, config, interpret)
    outputs = _down(tiles, hidden, weights.down.reshape(E * H, I), H, config, interpret)
    return combine(outputs, tiles.row_of).astype(out_dtype)


def _tiles(
    x, expert_ids, expert_weights, E: int, N: int, interpret, grouping: Grouping | None
) -> TokenTiles:
    """The batch as it is, or gathered in one launch, or by XLA."""
    T, K = expert_ids.shape
    N = N or fitting_token_tile(T, K, E)
    if grouping is None:
        if BatchTiles.fit(T, K):
            return BatchTiles(x=x, expert_ids=expert_ids, expert_weights=expert_weights, E=E)
        if T * K <= MOST_ASSIGNMENTS:
            tiles = Tiles(T=T, K=K, E=E, N=N)
            return gather_rows(x, expert_ids, expert_weights, tiles, interpret)
        grouping = group(expert_ids, expert_weights, E, token_tile=N)
    return gather_grouped(x, grouping)


def _gate_up(tiles: TokenTiles, gate_up, I: int, config: Config, interpret) -> jax.Array:
    """silu(gate_e x) * up_e x * weight of each tile's columns: [tiles * 2N, I] bf16.

    Tile by tile N rows of hi and N of lo.
    """
    N, H = tiles.N, gate_up.shape[1]
    columns, slots = _ring(config.gate_up_columns, config.gate_up_slots, ROWS + N)

    def kernel(
        table_gmem, weight_gmem, x_gmem, gate_up_gmem, hidden_gmem, shared, barrier
    ):  # fmt: skip
        (weights_smem, x_smem), (exchange_smem, hidden_smem) = shared
        index, block = tile_program(lax.axis_index("program"), I // NEURONS)
        tile = tiles.find(table_gmem, index)

        def multiply(acc):
            gate_row, up_row = gate_and_up_rows(tile.expert, block, NEURONS, I)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                for half, row in enumerate((gate_row, up_row)):
                    part = weights_smem.at[slot, pl.ds(half * NEURONS, NEURONS)]
                    copy_once(gate_up_gmem.at[pl.ds(row, NEURONS), at], part, arrived)
                copy_kept(x_gmem.at[pl.ds(tile.first_row, N), at], x_smem.at[slot], arrived)

            def consume(_, slot, carry):
                plgpu.wgmma(acc, weights_smem.at[slot], x_smem.at[slot].transpose((1, 0)))
                return carry

            tma_ring(
                H // columns,
                slots,
                barrier=barrier,
                copy=copy,
                consume=consume,
                init=(),
                wgmmas_in_flight=1,
            )
            weights = tiles.load_weights(weight_gmem, tile)
            hi_lo = gated.hidden(acc[...], weights, exchange_smem)
            for half, values in enumerate(hi_lo):
                hidden_smem[pl.ds(half * N, N), pl.ds(0, NEURONS)] = values
            plgpu.commit_smem()
            rows = [
                jnp.where(row >= 0, index * (2 * N) + half * N + column, -1)
                for half in range(2)
                for column, row in enumerate(tile.output_rows)
            ]
            neurons = pl.ds(block * NEURONS, NEURONS)
            store_rows(hidden_smem.at[:, pl.ds(0, NEURONS)], hidden_gmem.at[:, neurons], rows)
            plgpu.wait_smem_to_gmem(0)

        accumulator = plgpu.ACC((ROWS, N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))

    ring = [_operand(slots, ROWS, columns), _operand(slots, N, columns)]
    # A row begins at a multiple of 128 bytes, as the copy engine wants it.
    after_the_ring = [exchange_type(N), plgpu.SMEM((2 * N, 2 * NEURONS), jnp.bfloat16)]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.count * 2 * N, I), jnp.bfloat16),
        grid=(tiles.count * (I // NEURONS),),
        grid_names=("program",),
        scratch_types=[
            plgpu.RefUnion(ring, after_the_ring),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        ],
        kernel_name="expert_major_gate_up",
        interpret=interpret_params(interpret),
    )(*tiles.operands, gate_up)


def _down(tiles: TokenTiles, hidden, down, H: int, config: Config, interpret) -> jax.Array:
    """Row p = down_e (hi + lo), of the column that row p is: [num_outputs, H] float32.

    The rows of no column stay unwritten; combine does not read them.
    """
    N, I = tiles.N, hidden.shape[1]
    R = config.down_rows
    columns, slots = _ring(config.down_columns, config.down_slots, R + 2 * N)

    def kernel(table_gmem, hidden_gmem, down_gmem, outputs_gmem, shared, barrier):
        (down_smem, hidden_smem), outputs_smem = shared
        index, block = tile_program(lax.axis_index("program"), H // R)
        tile = tiles.find(table_gmem, index)

        def multiply(acc):
            weight_rows = pl.ds(down_rows(tile.expert, block, R, H), R)
            hidden_rows = pl.ds(index * (2 * N), 2 * N)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                copy_once(down_gmem.at[weight_rows, at], down_smem.at[slot], arrived)
                copy_kept(hidden_gmem.at[hidden_rows, at], hidden_smem.at[slot], arrived)

            def consume(_, slot, carry):
                plgpu.wgmma(acc, down_smem.at[slot], hidden_smem.at[slot].transpose((1, 0)))
                return carry

            tma_ring(
                I // columns,
                slots,
                barrier=barrier,
                copy=copy,
                consume=consume,
                init=(),
                wgmmas_in_flight=1,
            )
            products = acc[...]  # [R, 2N]
            gated.store_transposed(outputs_smem, products[:, :N] + products[:, N:])
            store_rows(outputs_smem, outputs_gmem.at[:, pl.ds(block * R, R)], tile.output_rows)
            plgpu.wait_smem_to_gmem(0)

        accumulator = plgpu.ACC((R, 2 * N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))

    ring = [_operand(slots, R, columns), _operand(slots, 2 * N, columns)]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.num_outputs, H), jnp.float32),
        grid=(tiles.count * (H // R),),
        grid_names=("program",),
        scratch_types=[
            plgpu.RefUnion(ring, plgpu.SMEM((N, R), jnp.float32)),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        kernel_name="expert_major_down",
        interpret=interpret_params(interpret),
    )(tiles.operands[0], hidden, down)


def _operand(*shape: int):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND)


def _ring(columns: int, slots: int, rows: int) -> tuple[int, int]:
    """Columns and slots of a ring of so many rows, cut so that two programs fit on a core.

    One program's loads go on while the other one stores its results: worth more than a long ring.
    """
    room = SHARED_MEMORY_BYTES // 2
    while columns > min(_COLUMNS) and 2 * _slot_bytes(columns, rows) > room:
        columns //= 2
    return columns, max(2, min(slots, room // _slot_bytes(columns, rows)))


def _slot_bytes(columns: int, rows: int) -> int:
    """Of both operands, in bf16."""
    return 2 * columns * rows


def combine(outputs: jax.Array, row_of: jax.Array) -> jax.Array:
    """out[t] = sum over k, in order, of outputs[row_of[t, k]]: [T, H] float32.

    Additions only: a product here could be fused into one of them, or not, by the size of T.
    """
    out = jnp.float32(0)
    for k in range(row_of.shape[1]):
        row = row_of[:, k, None]  # [T, 1]
        # Select, never multiply by zero: what lies at an unwritten row may be inf or NaN.
        out += jnp.where(row >= 0, outputs[jnp.maximum(row[:, 0], 0)], 0)  # [T, H]
    return out
