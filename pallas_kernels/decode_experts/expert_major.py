"""The expert-major layout (the conventional path): tiles of N tokens, each with one expert.

    tiles     an expert's tokens, gathered side by side              (gather_rows.py)
              or, up to 8 tokens, the whole batch for each expert    (batch_tiles.py)
    gate/up   program (tile, 32 neurons)   hidden[c] = silu(gate_e x[c]) * up_e x[c] * w[c]
    down      program (tile, R neurons)    outputs[p] = down_e hidden[c]    column c is row p's
    combine   out[t] = sum over k, in order, of outputs[row_of[t, k]]       (XLA)

What one program of gate/up or down does is in expert_major_programs.py. Both are one grid or two
launches, whichever was faster for such tiles. An expert's weights are read once for each of its
tiles: once, unless more than N tokens chose it. Programs on one expert's tiles are neighbours, so
that further reads may hit L2.

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

from pallas_kernels import grid
from pallas_kernels.decode_experts.batch_tiles import BatchTiles
from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.expert_major_programs import (
    COLUMNS,
    Down,
    GateUp,
    fit_ring,
    slot_bytes,
)
from pallas_kernels.decode_experts.gated import ROWS
from pallas_kernels.decode_experts.gather_rows import (
    MOST_ASSIGNMENTS,
    gather_grouped,
    gather_rows,
)
from pallas_kernels.decode_experts.grouping import (
    LARGEST_TOKEN_TILE,
    LEAST_TOKEN_TILE,
    fitting_token_tile,
    group,
)
from pallas_kernels.decode_experts.tiles import Tiles
from pallas_kernels.decode_experts.token_tiles import TokenTiles
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights
from pallas_kernels.mosaic import interpret_params

CAPABILITIES = (9,)  # wgmma

_TILES = (64, 128)
_LEAST_I_FOR_ONE_GRID = 512

# Every sum is one accumulator's, over a row of weights in ascending order of its columns, whatever
# the tiles are.
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
      token_tile: N of gathered tiles, a multiple of 8 up to 64; 0 takes fitting_token_tile.
      grids: 1 for both products in one grid, 2 for two launches, which is also what interpret mode
        runs; 0 takes fitting_grids.
    """

    gate_up_columns: int = 256
    gate_up_slots: int = 3
    down_rows: int = 128
    down_columns: int = 128
    down_slots: int = 3
    token_tile: int = 0
    grids: int = 0


def fitting_grids(N: int, gathered: bool, I: int) -> int:
    """1 or 2, as was faster for tiles of N tokens (results/designs/expert_major.md).

    Wide tiles' stores of outputs cost more beside gate/up's reads; and where I is small, programs
    of down are too short for each of them to wait for a counter.
    """
    return 2 if gathered and (N > LEAST_TOKEN_TILE or I < _LEAST_I_FOR_ONE_GRID) else 1


def default_config(shapes: ExpertShapes, T: int) -> Config:
    """The heuristic: slots of 32 KB of weights, few enough that two programs share an SM."""
    del T
    return Config(
        gate_up_columns=largest_divisor(shapes.H, COLUMNS),
        down_rows=largest_divisor(shapes.H, _TILES),
        down_columns=largest_divisor(shapes.I, _TILES),
    )


def candidate_configs(shapes: ExpertShapes, T: int) -> list[Config]:
    """Configs worth measuring, the default first, then what has won before.

    64 rows of output neurons make twice the programs, for few tokens; with narrow gate/up slots as
    well, three of them share an SM. A shard's experts get fewer tokens than T and K let expect,
    since most ids are other shards': there narrow tiles may do. For gathered tiles of 8, one grid
    and two launches are within a percent or so, either way.
    """
    default = default_config(shapes, T)
    narrow = {"gate_up_columns": largest_divisor(shapes.H, _TILES)}
    changes = [{"down_rows": 64, "down_slots": 4}, narrow | {"down_rows": 64}]
    if fitting_token_tile(T, shapes.K, shapes.E) > LEAST_TOKEN_TILE:
        changes = [{"token_tile": LEAST_TOKEN_TILE}, *changes]
    elif not BatchTiles.fit(T, shapes.K):
        other = 1 if fitting_grids(LEAST_TOKEN_TILE, True, shapes.I) == 2 else 2
        changes = [{"grids": other}, *changes]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("gate_up_columns", c.gate_up_columns, COLUMNS, "H", H)
    check_tile("down_rows", c.down_rows, _TILES, "H", H)
    check_tile("down_columns", c.down_columns, COLUMNS, "I", I)
    gate_up_slot = slot_bytes(c.gate_up_columns, ROWS + LEAST_TOKEN_TILE)
    down_slot = slot_bytes(c.down_columns, c.down_rows + 2 * LEAST_TOKEN_TILE)
    check_slots("gate_up_slots", c.gate_up_slots, gate_up_slot, least=2)
    check_slots("down_slots", c.down_slots, down_slot, least=2)
    tiles = range(0, LARGEST_TOKEN_TILE + 1, LEAST_TOKEN_TILE)
    if isinstance(c.token_tile, bool) or c.token_tile not in tiles:
        raise ValueError(
            f"config.token_tile is {c.token_tile!r}; expected 0 or a multiple of "
            f"{LEAST_TOKEN_TILE} up to {LARGEST_TOKEN_TILE}"
        )
    if isinstance(c.grids, bool) or c.grids not in (0, 1, 2):
        raise ValueError(f"config.grids is {c.grids!r}; expected 0, 1 or 2")


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
) -> jax.Array:
    """Runs all launches and combines, on checked inputs; shapes as in decode_experts."""
    E, _, I, H = weights.gate_up.shape
    tiles = _tiles(x, expert_ids, expert_weights, E, config.token_tile, interpret)
    gate_up, down = _products(tiles, H, I, config, apart=not interpret)
    stored = weights.gate_up.reshape(E * 2 * I, H), weights.down.reshape(E * H, I)
    grids = config.grids or fitting_grids(tiles.N, not isinstance(tiles, BatchTiles), I)
    if interpret or grids == 2:  # the interpreter cannot wait within a grid
        hidden = _launch(gate_up, "gate_up", (*tiles.operands, stored[0]), interpret)
        outputs = _launch(down, "down", (tiles.operands[0], hidden, stored[1]), interpret)
    else:
        outputs = _one_grid(gate_up, down, *tiles.operands, *stored)
    return combine(outputs, tiles.row_of).astype(out_dtype)


def _products(
    tiles: TokenTiles, H: int, I: int, config: Config, apart: bool
) -> tuple[GateUp, Down]:
    R, N = config.down_rows, tiles.N
    columns, slots = fit_ring(config.gate_up_columns, config.gate_up_slots, ROWS + N)
    gate_up = GateUp(tiles=tiles, H=H, I=I, columns=columns, slots=slots, apart=apart)
    columns, slots = fit_ring(config.down_columns, config.down_slots, R + 2 * N)
    return gate_up, Down(tiles=tiles, H=H, I=I, R=R, columns=columns, slots=slots)


def _tiles(x, expert_ids, expert_weights, E: int, N: int, interpret) -> TokenTiles:
    """The batch as it is, or gathered in one launch, or by XLA."""
    T, K = expert_ids.shape
    N = N or fitting_token_tile(T, K, E)
    if BatchTiles.fit(T, K):
        return BatchTiles(x=x, expert_ids=expert_ids, expert_weights=expert_weights, E=E)
    if T * K <= MOST_ASSIGNMENTS:
        tiles = Tiles(T=T, K=K, E=E, N=N)
        return gather_rows(x, expert_ids, expert_weights, tiles, interpret)
    return gather_grouped(x, group(expert_ids, expert_weights, E, token_tile=N))


def _launch(product: GateUp | Down, name: str, operands, interpret) -> jax.Array:
    """All programs of a product; returns what they write."""

    def kernel(*refs):
        product.run(lax.axis_index("program"), *refs)

    return plgpu.kernel(
        kernel,
        out_type=product.out_type,
        grid=(product.programs,),
        grid_names=("program",),
        scratch_types=[plgpu.RefUnion(*product.shared_types()), product.arrived_type()],
        kernel_name=f"expert_major_{name}",
        interpret=interpret_params(interpret),
    )(*operands)


def _one_grid(gate_up: GateUp, down: Down, *operands) -> jax.Array:
    """Both products' programs in one grid, gate/up first, so that no core waits in between.

    When a program of `down` waits for the hidden of its tile, those who make it are at work or
    done, for they have lower numbers, and they wait for nobody (grid.py).
    """
    tiles = gate_up.tiles

    def kernel(
        table, weight_of, x, gate_up_gmem, down_gmem, counters, hidden, outputs,
        shared, gate_up_arrived, down_arrived,
    ):  # fmt: skip
        program, used = lax.axis_index("program"), tiles.used(table)

        def done(tile):
            grid.count(counters, tile)

        def ready(tile):
            grid.wait_for_count(counters, tile, gate_up.blocks, down.blocks)

        @pl.when(program < used * gate_up.blocks)
        def _():
            gate_up.run(
                program, table, weight_of, x, gate_up_gmem, hidden,
                shared[:2], gate_up_arrived, done,
            )  # fmt: skip

        program -= used * gate_up.blocks

        @pl.when((program >= 0) & (program < used * down.blocks))
        def _():
            down.run(program, table, hidden, down_gmem, outputs, shared[2:], down_arrived, ready)

    @jax.custom_batching.sequential_vmap  # the counters are for one call at a time
    def call(*operands):
        return plgpu.kernel(
            kernel,
            out_type=(gate_up.out_type, down.out_type),
            grid=(gate_up.programs + down.programs,),
            grid_names=("program",),
            scratch_types=[
                plgpu.RefUnion(*gate_up.shared_types(), *down.shared_types()),
                gate_up.arrived_type(),
                down.arrived_type(),
            ],
            kernel_name="expert_major",
        )(*operands, grid.tile_counters(tiles.count))

    return call(*operands)[1]


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
