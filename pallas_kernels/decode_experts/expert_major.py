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

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.configs import (
    Layout,
    check_block,
    check_num_stages,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.expert_major_fp8 import (
    FP8_BLOCK_KS,
    FP8_MAX_BLOCK_N,
    fp8_products,
    fp8_stage_bytes,
)
from pallas_kernels.decode_experts.expert_major_kernels import (
    BLOCK_KS,
    Down,
    GateUp,
    fit_stages,
    stage_bytes,
)
from pallas_kernels.decode_experts.expert_schedule import (
    MAX_BLOCK_N,
    MIN_BLOCK_N,
    ExpertSchedule,
    default_block_n,
)
from pallas_kernels.decode_experts.gather import MAX_ASSIGNMENTS, gather_by_xla, gather_rows
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.swiglu_epilogue import product_rows
from pallas_kernels.decode_experts.token_tiles import TokenTiles, WholeBatchTiles
from pallas_kernels.decode_experts.weights import ExpertWeights
from pallas_kernels.mosaic.device import HOPPER, launch
from pallas_kernels.mosaic.grid_sync import signal, wait, zeroed_counters

_BLOCK_MS = (64, 128)
# Of blocks of gate/up and of down, by the weights' format.
NEURONS = {"bf16": (16, 32, 64), "fp8": (32, 64)}
DOWN_BLOCK_MS = {"bf16": (64, 128, 256), "fp8": (64, 128)}
_MIN_I_TO_FUSE = 512

# Where popular experts have several tiles, L2 and not memory is the limit. Tiles of 16 are fewer,
# and tall blocks load their tokens and hidden less often.
_TALL = {
    "gate_up_neurons": 64,
    "gate_up_block_k": 128,
    "down_block_m": 256,
    "block_n": 16,
    "fused": True,
}

# The default's three blocks a core in other forms, then four of them, then two with larger stages.
_FP8_CHANGES = [
    {"gate_up_neurons": 64, "gate_up_block_k": 128},
    {"down_block_m": 64, "down_block_k": 256, "down_num_stages": 2},
    {
        "gate_up_neurons": 64,
        "gate_up_block_k": 128,
        "gate_up_num_stages": 2,
        "down_num_stages": 2,
    },
    {"gate_up_neurons": 64, "gate_up_num_stages": 2, "down_block_k": 256, "down_num_stages": 2},
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMajorConfig:
    """How expert_major cuts the work; nothing here changes a bit of a result on a GPU.

    FP8 weights take block_k of 128 or 256, and block_n up to 32.

    Attributes:
      gate_up_neurons: neurons of a gate/up block; 16, 32 or 64, with FP8 weights 32 or 64.
      gate_up_block_k: columns of x and gate_up in a stage; 64, 128 or 256, divides H.
      gate_up_num_stages: stages of gate/up. Fewer are used, and half or a quarter of their columns,
        where two blocks would not fit on a core otherwise.
      down_block_m: output neurons of a down block; 64, 128 or, of bf16 weights, 256; divides H.
      down_block_k: columns of hidden and down in a stage; 64, 128 or 256, divides I.
      down_num_stages: stages of down, likewise.
      block_n: rows of gathered tiles, a multiple of 8 up to 64; None takes default_block_n.
      fused: True for both products in one grid, False for two launches; None takes default_fused.
    """

    gate_up_neurons: int = 32
    gate_up_block_k: int = 256
    gate_up_num_stages: int = 3
    down_block_m: int = 128
    down_block_k: int = 128
    down_num_stages: int = 3
    block_n: int | None = None
    fused: bool | None = None


def default_fused(N: int, gathered: bool, I: int) -> bool:
    """Whether one grid was faster than two launches for tiles of N tokens (docs/lab.md).

    Wide tiles' stores of outputs cost more beside gate/up's reads. Where I is small, blocks of down
    are too short for each of them to wait for a counter.
    """
    return not gathered or (N == MIN_BLOCK_N and I >= _MIN_I_TO_FUSE)


def _default_config(shapes: ExpertShapes, T: int) -> ExpertMajorConfig:
    """The heuristic: stages of 32 KB of weights, few enough that two blocks share a core.

    With FP8 weights it is three blocks, with converted tokens beside smaller stages. A few tokens
    leave room for larger ones.
    """
    if shapes.weights == "fp8":
        few = T <= 2
        return ExpertMajorConfig(
            gate_up_neurons=32,
            gate_up_block_k=largest_divisor(shapes.H, FP8_BLOCK_KS if few else FP8_BLOCK_KS[:1]),
            gate_up_num_stages=4 if few else 5,
            down_block_m=largest_divisor(shapes.H, _BLOCK_MS),
            down_block_k=128,
        )
    return ExpertMajorConfig(
        gate_up_block_k=largest_divisor(shapes.H, BLOCK_KS),
        down_block_m=largest_divisor(shapes.H, _BLOCK_MS),
        down_block_k=largest_divisor(shapes.I, _BLOCK_MS),
    )


def _candidates(shapes: ExpertShapes, T: int) -> list[ExpertMajorConfig]:
    """Configs worth measuring, the default first, then what has won before.

    64 output neurons make twice the blocks, for few tokens; with narrow gate/up stages as well,
    three of them share a core. A shard's experts get fewer tokens than T and K let expect, because
    most ids are other shards': there narrow tiles may do. For gathered tiles of 8, one grid and two
    launches are within a percent or so, either way.
    """
    default = _default_config(shapes, T)
    narrow = {"gate_up_block_k": largest_divisor(shapes.H, _BLOCK_MS)}
    changes = [{"down_block_m": 64, "down_num_stages": 4}, narrow | {"down_block_m": 64}]
    if shapes.weights == "fp8":
        changes = _FP8_CHANGES
    if default_block_n(T, shapes.K, shapes.E) > MIN_BLOCK_N:
        changes = [{"block_n": MIN_BLOCK_N}, *changes]
    elif not WholeBatchTiles.fit(T, shapes.K):
        tall = [] if shapes.weights == "fp8" else [_TALL]
        changes = [{"fused": not default_fused(MIN_BLOCK_N, True, shapes.I)}, *tall, *changes]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(_check, configs, shapes)


def _check(config: ExpertMajorConfig, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    fp8 = shapes.weights == "fp8"
    block_ks, most_block_n = (FP8_BLOCK_KS, FP8_MAX_BLOCK_N) if fp8 else (BLOCK_KS, MAX_BLOCK_N)
    check_block("gate_up_neurons", c.gate_up_neurons, NEURONS[shapes.weights], "I", I)
    check_block("gate_up_block_k", c.gate_up_block_k, block_ks, "H", H)
    check_block("down_block_m", c.down_block_m, DOWN_BLOCK_MS[shapes.weights], "H", H)
    check_block("down_block_k", c.down_block_k, block_ks, "I", I)
    bytes_of = fp8_stage_bytes if fp8 else _stage_bytes
    for name, of_stage in bytes_of(c).items():
        check_num_stages(name, getattr(c, name), of_stage, least=2)
    if c.block_n is not None and c.block_n not in range(MIN_BLOCK_N, most_block_n + 1, MIN_BLOCK_N):
        raise ValueError(
            f"config.block_n is {c.block_n!r}; expected None or a multiple of {MIN_BLOCK_N} "
            f"up to {most_block_n}"
        )
    if not (c.fused is None or isinstance(c.fused, bool)):
        raise ValueError(f"config.fused is {c.fused!r}; expected None, True or False")


def _stage_bytes(c: ExpertMajorConfig) -> dict[str, int]:
    """Of bf16 weights and 8 tokens, by the field that says how many there are."""
    return {
        "gate_up_num_stages": stage_bytes(
            c.gate_up_block_k, product_rows(c.gate_up_neurons) + MIN_BLOCK_N
        ),
        "down_num_stages": stage_bytes(c.down_block_k, c.down_block_m + 2 * MIN_BLOCK_N),
    }


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
    return _combine(outputs, tiles.row_of).astype(out_dtype)


def _tiles(x, expert_ids, expert_weights, E: int, block_n: int, interpret) -> TokenTiles:
    """The batch as it is, or gathered in one launch, or by XLA."""
    T, K = expert_ids.shape
    if WholeBatchTiles.fit(T, K):
        return WholeBatchTiles(x=x, expert_ids=expert_ids, expert_weights=expert_weights, E=E)
    schedule = ExpertSchedule(T=T, K=K, E=E, block_n=block_n)
    if T * K <= MAX_ASSIGNMENTS:
        return gather_rows(x, expert_ids, expert_weights, schedule, interpret)
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


def _combine(outputs: jax.Array, row_of: jax.Array) -> jax.Array:
    """out[t] = sum over k, in order, of outputs[row_of[t, k]]: [T, H] float32.

    Additions only: a product here could be fused into one of them, or not, by the size of T.
    """
    out = jnp.float32(0)
    for k in range(row_of.shape[1]):
        row = row_of[:, k, None]  # [T, 1]
        # Select, never multiply by zero: what lies at an unwritten row may be inf or NaN.
        out += jnp.where(row >= 0, outputs[jnp.maximum(row[:, 0], 0)], 0)  # [T, H]
    return out


EXPERT_MAJOR = Layout(
    name="expert_major",
    capabilities=(HOPPER,),  # wgmma
    # Every sum is one accumulator's, over a row of weights in ascending order of its columns,
    # whatever the tiles are.
    sum_order="by_expert",
    Config=ExpertMajorConfig,
    default_config=_default_config,
    candidates=_candidates,
    check=_check,
    run=_run,
)
