"""The expert-major layout (the conventional path): tiles of routed tokens, each with one expert.

    group     the assignments (t, k) of each expert fill tiles of N rows
    gather    rows[p] = x[t] of the assignment that owns row p             (both in gather_rows.py)
    gate/up   program (tile, 32 neurons)   hidden[p] = silu(gate_e rows[p]) * up_e rows[p] * w[p]
    down      program (tile, R neurons)    outputs[p] = down_e hidden[p]
    combine   out[t] = sum over k, in order, of outputs[row_of[t, k]]      (XLA)

An expert's weights are read once for each of its tiles: once, unless more than N tokens chose it.
Programs on one expert's tiles are neighbours, so that further reads may hit L2.

A few tokens are too few rows for the tensor cores' M = 64, so each product is turned around
("swap-AB"): weight rows are M, the tile's N tokens are columns, results come out transposed.

The tensor cores want bf16, and rounding hidden to bf16 would add an error as large as the output's
own rounding. So it is kept as hi + lo, two bf16 numbers with 16 bits of mantissa between them: 2 N
rows of the [2P, I] intermediate, 2 N columns of one product whose halves are added in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.gated import NEURONS, OPERAND, ROWS, exchange_type
from pallas_kernels.decode_experts.gather_rows import (
    MOST_ASSIGNMENTS,
    Gathered,
    gather_grouped,
    gather_rows,
)
from pallas_kernels.decode_experts.grouping import (
    LARGEST_TOKEN_TILE,
    Grouping,
    fitting_token_tile,
    group,
)
from pallas_kernels.decode_experts.tiles import Tiles
from pallas_kernels.decode_experts.weights import (
    ExpertShapes,
    ExpertWeights,
    down_rows,
    gate_and_up_rows,
)
from pallas_kernels.mosaic import interpret_params, tma_ring

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
      gate_up_slots: slots in the gate/up ring.
      down_rows: R, output neurons of a down program; 64 or 128, divides H.
      down_columns: columns of hidden and down in a ring slot; 64, 128 or 256, divides I.
      down_slots: slots in the down ring.
      token_tile_factor: N is so many times fitting_token_tile, but at most 64; 1, 2 or 4. A
        Grouping that is passed in has its own N.
    """

    gate_up_columns: int = 256
    gate_up_slots: int = 3
    down_rows: int = 128
    down_columns: int = 128
    down_slots: int = 3
    token_tile_factor: int = 1


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
    programs share an SM. Where an expert's mean nearly fills a tile, the weights of many are read
    again for a second one, unless tiles are wider.
    """
    default = default_config(shapes, T)
    short_down = {"down_rows": 64, "down_slots": 4}
    narrow = {"gate_up_columns": largest_divisor(shapes.H, _TILES), "gate_up_slots": 4}
    changes = [short_down, narrow | short_down]
    if shapes.E * fitting_token_tile(T, shapes.K, shapes.E) < 2 * T * shapes.K:
        changes = [{"token_tile_factor": 2}, *changes]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("gate_up_columns", c.gate_up_columns, _COLUMNS, "H", H)
    check_tile("down_rows", c.down_rows, _TILES, "H", H)
    check_tile("down_columns", c.down_columns, _COLUMNS, "I", I)
    # Both in bf16, with the largest token tile.
    gate_up_slot = 2 * c.gate_up_columns * (ROWS + LARGEST_TOKEN_TILE)
    down_slot = 2 * c.down_columns * (c.down_rows + 2 * LARGEST_TOKEN_TILE)
    check_slots("gate_up_slots", c.gate_up_slots, gate_up_slot, least=2)
    check_slots("down_slots", c.down_slots, down_slot, least=2)
    if c.token_tile_factor not in (1, 2, 4):
        raise ValueError(f"config.token_tile_factor is {c.token_tile_factor!r}; expected 1, 2 or 4")


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
    """Groups, runs both launches and combines, on checked inputs; shapes as in decode_experts."""
    E, _, I, H = weights.gate_up.shape
    T, K = expert_ids.shape
    N = min(LARGEST_TOKEN_TILE, config.token_tile_factor * fitting_token_tile(T, K, E))
    if grouping is None and T * K <= MOST_ASSIGNMENTS:
        tiles = Tiles(T=T, K=K, E=E, N=N)
        gathered = gather_rows(x, expert_ids, expert_weights, tiles, interpret)
    else:
        if grouping is None:
            grouping = group(expert_ids, expert_weights, E, token_tile=N)
        gathered, N = gather_grouped(x, grouping), grouping.token_tile
    gate_up = weights.gate_up.reshape(E * 2 * I, H)
    hidden = _gate_up(gathered, gate_up, N, I, config, interpret)
    down = weights.down.reshape(E * H, I)
    outputs = _down(gathered.expert_of, hidden, down, N, H, config, interpret)
    return combine(outputs, gathered.row_of).astype(out_dtype)


def _gate_up(gathered: Gathered, gate_up, N: int, I: int, config: Config, interpret) -> jax.Array:
    """silu(gate_e rows[p]) * up_e rows[p] * weight_of[p]: [2P, I] bf16.

    Tile by tile N rows of hi and N of lo.
    """
    P, H = gathered.rows.shape
    columns, slots = config.gate_up_columns, config.gate_up_slots

    def kernel(
        expert_gmem, weight_gmem, rows_gmem, gate_up_gmem, hidden_gmem,
        weights_smem, rows_smem, exchange_smem, barrier,
    ):  # fmt: skip
        tile, block = tile_program(lax.axis_index("program"), I // NEURONS)
        expert = expert_gmem[tile]

        def multiply(acc):
            gate_row, up_row = gate_and_up_rows(expert, block, NEURONS, I)
            tile_rows = pl.ds(tile * N, N)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                for half, row in enumerate((gate_row, up_row)):
                    part = weights_smem.at[slot, pl.ds(half * NEURONS, NEURONS)]
                    plgpu.copy_gmem_to_smem(gate_up_gmem.at[pl.ds(row, NEURONS), at], part, arrived)
                plgpu.copy_gmem_to_smem(rows_gmem.at[tile_rows, at], rows_smem.at[slot], arrived)

            def consume(_, slot, carry):
                tokens = rows_smem.at[slot].transpose((1, 0))  # [columns, N]
                plgpu.wgmma(acc, weights_smem.at[slot], tokens)
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
            weights = gated.load_weights(weight_gmem.at[tile_rows])
            for half, values in enumerate(gated.hidden(acc[...], weights, exchange_smem)):
                rows = pl.ds(tile * (2 * N) + half * N, N)
                hidden_gmem[rows, pl.ds(block * NEURONS, NEURONS)] = values

        accumulator = plgpu.ACC((ROWS, N), jnp.float32)
        pl.when(expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((2 * P, I), jnp.bfloat16),
        grid=(P // N * (I // NEURONS),),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((slots, ROWS, columns), jnp.bfloat16, transforms=OPERAND),
            plgpu.SMEM((slots, N, columns), jnp.bfloat16, transforms=OPERAND),
            exchange_type(N),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        ],
        kernel_name="expert_major_gate_up",
        interpret=interpret_params(interpret),
    )(gathered.expert_of, gathered.weight_of, gathered.rows, gate_up)


def _down(expert_of, hidden, down, N: int, H: int, config: Config, interpret) -> jax.Array:
    """outputs[p] = down_e (hi[p] + lo[p]): [P, H] float32.

    The rows of unused tiles stay unwritten; combine does not read them.
    """
    P2, I = hidden.shape
    R, columns, slots = config.down_rows, config.down_columns, config.down_slots

    def kernel(
        expert_gmem, hidden_gmem, down_gmem, outputs_gmem,
        down_smem, hidden_smem, barrier,
    ):  # fmt: skip
        tile, block = tile_program(lax.axis_index("program"), H // R)
        expert = expert_gmem[tile]

        def multiply(acc):
            weight_rows = pl.ds(down_rows(expert, block, R, H), R)
            hidden_rows = pl.ds(tile * (2 * N), 2 * N)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                plgpu.copy_gmem_to_smem(down_gmem.at[weight_rows, at], down_smem.at[slot], arrived)
                plgpu.copy_gmem_to_smem(
                    hidden_gmem.at[hidden_rows, at], hidden_smem.at[slot], arrived
                )

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
            outputs = products[:, :N] + products[:, N:]  # [R, N]
            outputs = plgpu.layout_cast(outputs, plgpu.Layout.WGMMA_TRANSPOSED)
            tile_outputs = outputs_gmem.at[pl.ds(tile * N, N), pl.ds(block * R, R)]
            tile_outputs.transpose((1, 0))[...] = outputs

        accumulator = plgpu.ACC((R, 2 * N), jnp.float32)
        pl.when(expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((P2 // 2, H), jnp.float32),
        grid=(P2 // (2 * N) * (H // R),),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((slots, R, columns), jnp.bfloat16, transforms=OPERAND),
            plgpu.SMEM((slots, 2 * N, columns), jnp.bfloat16, transforms=OPERAND),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        kernel_name="expert_major_down",
        interpret=interpret_params(interpret),
    )(expert_of, hidden, down)


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
