"""The streamed layout: each unique expert read once, in one launch, at any number of tokens.

    tiles      N columns of one expert each, found by every program from the ids  (tiles.py)
    gather     each assignment's row of its tile: its token's x                   (phase 0)
    ---------- barrier of the whole grid, the first gate and up weights on their way ---------------
    gate/up    unit (tile, 32 neurons): hidden = w * silu(gate_e rows) * up_e rows    (phase 1)
    ---------- barrier, the ring filling up with down weights --------------------------------------
    down       item (tile, 64 neurons): outputs = down_e hidden                       (phase 2)
    combine    out[t] = sum over k, in order, of the outputs of (t, k)                (XLA)

One program on each core runs all phases. All its weights, of either product, come through one ring
of slots in shared memory, so that the memory is busy from the first step to the last:

    program 0:  tiles | fill, gather, barrier | unit | unit | ...  | barrier | item | item | ...
    ring:               gu gu .................. gu gu gu gu d d d   (d does not wait)   d d d d

Units and items go to whichever program is free next (streamed_shares): with runs of the same length
the last program came in up to 30 us after the average one.

The products run on the tensor cores as in expert_major: weight rows are M, the columns are N,
hidden is kept as hi + lo. Each sum is over one expert's H or I in ascending order, then over k, so
nothing about it depends on the other tokens, and a token has the bits that expert_major gives it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grid, mosaic
from pallas_kernels.decode_experts import streamed_shares
from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.expert_major import combine
from pallas_kernels.decode_experts.gated import OPERAND, ROWS, exchange_type
from pallas_kernels.decode_experts.gather_rows import gather_rows
from pallas_kernels.decode_experts.grouping import fitting_token_tile
from pallas_kernels.decode_experts.streamed_phases import Refs, Work
from pallas_kernels.decode_experts.streamed_program import (
    run_all,
    run_down_alone,
    run_gate_up_alone,
)
from pallas_kernels.decode_experts.tiles import Tiles, pad_ids
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights

CAPABILITIES = (9,)  # wgmma

# Beyond this many tokens the batch is cut, and each part streams its experts by itself.
MOST_TOKENS = 128
_LEAST_SLOTS = 2
_INTERPRETED_PROGRAMS = 2
_COLUMNS = (64, 128, 256)  # a TMA box has at most 256 elements a side
# As in expert_major: no tile or slot changes a sum.
SUM_ORDER = "by_expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How streamed cuts the work; nothing here changes a bit of a result on a GPU.

    Attributes:
      columns: columns of weights in a ring slot; 64, 128 or 256, divides H and I.
      slots: slots in the ring, of 64 * columns weights each; at least 2. Fewer are used where the
        tiles need the room.
    """

    columns: int = 256
    slots: int = 6


def default_config(shapes: ExpertShapes, T: int) -> Config:
    """The heuristic: slots of 32 KB, as many as fit."""
    del T
    return Config(columns=largest_divisor(np.gcd(shapes.H, shapes.I), _COLUMNS))


def candidate_configs(shapes: ExpertShapes, T: int) -> list[Config]:
    """Configs worth measuring, the default first: shorter rings, and narrower slots.

    The others have no more slots than fit, so that no two are the same kernel.
    """
    default = default_config(shapes, T)
    tiles = _tiles(min(T, MOST_TOKENS), shapes)

    def fitting(config):
        return dataclasses.replace(config, slots=_slots(config, tiles))

    changes = [{"slots": 4}, {"columns": 128, "slots": 8}, {"columns": 128, "slots": 12}]
    others = [fitting(dataclasses.replace(default, **fields)) for fields in changes]
    configs = [default, *(config for config in others if config != fitting(default))]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("columns", c.columns, _COLUMNS, "H", H)
    check_tile("columns", c.columns, _COLUMNS, "I", I)
    check_slots("slots", c.slots, 2 * c.columns * ROWS, least=_LEAST_SLOTS)


def _slots(config: Config, tiles: Tiles) -> int:
    """How many slots fit beside the rest of the shared memory."""
    tables = {**tiles.scratch_types(), **streamed_shares.scratch_types()}.values()
    refs = [ref for ref in tables if not isinstance(ref, plgpu.Barrier)]
    rest = sum(4 * int(np.prod(ref.shape)) for ref in refs)
    rest += 2 * 4 * tiles.N * ROWS
    a_slot = 2 * config.columns * (ROWS + 2 * tiles.N)
    return min(config.slots, (mosaic.SHARED_MEMORY_BYTES - rest) // a_slot)


def _tiles(T: int, shapes: ExpertShapes) -> Tiles:
    """The tiles of T tokens, of 32 columns at most: they change no sum."""
    N = min(32, fitting_token_tile(T, shapes.K, shapes.E))
    return Tiles(T=T, K=shapes.K, E=shapes.E, N=N)


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
    grouping=None,
) -> jax.Array:
    """Runs the kernel and adds what it made, on checked inputs; shapes as in decode_experts.

    A Grouping is not used: each program finds the tiles by itself.
    """
    del grouping
    T = x.shape[0]
    outputs = []
    for start in range(0, T, MOST_TOKENS):
        part = slice(start, min(start + MOST_TOKENS, T))
        products, row_of = routed_outputs(
            x[part], weights, expert_ids[part], expert_weights[part], config, interpret
        )
        outputs.append(combine(products, row_of))
    return jnp.concatenate(outputs).astype(out_dtype)


def routed_outputs(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    config: Config,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Each routed expert's part of the output, times its weight: rows for `combine` to add.

    For at most MOST_TOKENS tokens; a caller that adds the rows itself, together with a residual,
    saves a kernel.

    Returns:
      [P, H] float32, and [T, K] int32: the row of each assignment, -1 for padding.
    """

    @jax.custom_batching.sequential_vmap  # a grid that fills the GPU cannot be batched
    def call(x, gate_up, down, expert_ids, expert_weights):
        return _routed_outputs(x, gate_up, down, expert_ids, expert_weights, config, interpret)

    return call(x, weights.gate_up, weights.down, expert_ids, expert_weights)


def _routed_outputs(x, gate_up, down, expert_ids, expert_weights, config: Config, interpret):
    (E, _, I, H), (T, K) = gate_up.shape, expert_ids.shape
    tiles = _tiles(T, ExpertShapes(E=E, K=K, H=H, I=I))
    work = Work(
        H=H,
        I=I,
        tiles=tiles,
        columns=config.columns,
        slots=_slots(config, tiles),
        num_programs=_INTERPRETED_PROGRAMS if interpret else mosaic.core_count(),
    )
    gate_up, down = gate_up.reshape(E * 2 * I, H), down.reshape(E * H, I)
    if work.slots < _LEAST_SLOTS:
        raise NotImplementedError(
            f"streamed keeps what it knows of {T} tokens with {K} of {E} experts each in shared "
            f"memory, where no room is left for {_LEAST_SLOTS} slots of weights; expert_major can"
        )
    run = _in_three_launches if interpret else _in_one_launch
    return run(work, x, gate_up, down, expert_ids, expert_weights, interpret)


def _output_types(work: Work) -> dict[str, jax.ShapeDtypeStruct]:
    """What the phases write, by the names of Refs."""
    struct, rows = jax.ShapeDtypeStruct, work.tiles.rows
    return {
        "rows": struct((rows, work.H), jnp.bfloat16),
        "weight_of": struct((rows,), jnp.float32),
        "row_of": struct((work.tiles.assignments,), jnp.int32),
        "hidden": struct((2 * rows, work.I), jnp.bfloat16),
        "outputs": struct((rows, work.H), jnp.float32),
    }


def _scratch_types(work: Work) -> dict:
    """By the names of Refs."""

    def operand(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND)

    return {
        "tables": work.tiles.scratch_types(),
        "shares": streamed_shares.scratch_types(),
        "ring": operand(work.slots, ROWS, work.columns),
        "tokens": operand(work.slots, 2 * work.N, work.columns),
        "ring_arrived": plgpu.Barrier(num_arrivals=3, num_barriers=work.slots),
        "gate_and_up": exchange_type(work.N),
        "products": plgpu.SMEM((work.N, ROWS), jnp.float32),
    }


def _launch(work: Work, body, name: str, inputs: dict, outputs: list[str], interpret) -> dict:
    """Runs body(refs) on the grid; inputs and outputs are by the names of Refs."""
    types = _output_types(work)

    def kernel(*refs, **scratch):
        gmem = dict(zip((*inputs, *outputs), refs, strict=True))
        body(Refs(**gmem, **scratch))

    results = plgpu.kernel(
        kernel,
        out_type=tuple(types[field] for field in outputs),
        grid=(work.num_programs,),
        grid_names=("program",),
        scratch_types=_scratch_types(work),
        kernel_name=name,
        interpret=mosaic.interpret_params(interpret),
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _in_one_launch(work: Work, x, gate_up, down, expert_ids, expert_weights, interpret):
    del interpret

    def body(refs):
        barrier = functools.partial(grid.barrier, refs.counter, work.num_programs)
        run_all(work, refs, barrier)

    inputs = {
        "ids": pad_ids(expert_ids),
        "x": x,
        "weights": expert_weights.reshape(-1),
        "gate_up": gate_up,
        "down": down,
        "counter": grid.counters(),
    }
    made = _launch(work, body, "streamed", inputs, list(_output_types(work)), False)
    return made["outputs"], made["row_of"].reshape(expert_ids.shape)


def _in_three_launches(work: Work, x, gate_up, down, expert_ids, expert_weights, interpret):
    """The same for interpret mode, which has no barrier of the whole grid."""
    gathered = gather_rows(x, expert_ids, expert_weights, work.tiles, interpret)
    known = {
        "ids": pad_ids(expert_ids),
        "rows": gathered.rows,
        "weight_of": gathered.weight_of,
        "gate_up": gate_up,
        "down": down,
    }
    for phase, needs, makes in (
        (run_gate_up_alone, ["ids", "rows", "weight_of", "gate_up"], "hidden"),
        (run_down_alone, ["ids", "hidden", "down"], "outputs"),
    ):
        known |= _launch(
            work,
            lambda refs, phase=phase: phase(work, refs),
            f"streamed_{makes}",
            {field: known[field] for field in needs},
            [makes],
            interpret,
        )
    return known["outputs"], gathered.row_of
