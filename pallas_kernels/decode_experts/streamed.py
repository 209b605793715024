"""The streamed layout: each unique expert read once, in one launch, at any number of tokens.

    tiles      8 columns of one expert each: all tokens, or those routed there   (streamed_columns)
    gate/up    unit (tile, 64 neurons)      hidden[tile] = w * silu(gate_e x) * up_e x
    ---------- barrier of the whole grid, the ring filling up with down weights meanwhile ----------
    down       item (64 neurons, range of I) partial[range] = sum over tiles of down_e hidden[tile]
    sum        out = sum over the ranges, in order                               (XLA)

One program on each core runs both phases. All its weights, of either phase, come through one ring
of slots in shared memory, so that the memory is busy from the first step to the last:

    program 0:  fill | unit 0 | unit 132 | ...  | store, barrier | item 131 | write
    ring:         gu gu gu gu gu gu gu gu d d d   (d does not wait)   d d d d d

The down phase is output-major: sums over all experts stay on the core, and only as many partial
sums as there are ranges of I go through memory. What decides the order of a token's additions are
those fixed ranges and the ascending ids of its experts, nothing about the other tokens.

The products run on the tensor cores as in expert_major: weight rows are M, the columns are N,
hidden is kept as hi + lo.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.streamed_columns import ROWS, EveryToken, RoutedTokens
from pallas_kernels.decode_experts.streamed_phases import (
    OPERAND,
    Refs,
    Work,
    run_both,
    run_down_alone,
    run_gate_up_alone,
)
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights

CAPABILITIES = (9,)  # wgmma

# Beyond this many tokens the batch is cut, and each part streams its experts by itself: the down
# phase's sums of more tokens would leave no room for the ring.
MOST_TOKENS = 128
_INTERPRETED_PROGRAMS = 2
# EveryToken's columns have room for 8; beyond that, tokens are compacted.
EVERY_TOKEN_UP_TO = 8
_COLUMNS = (64, 128, 256)  # a TMA box has at most 256 elements a side

FREE_FIELDS = ("slots",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How streamed cuts the work. Columns set the order of sums and may not depend on T.

    Attributes:
      columns: columns of weights in a ring slot, and the range of I that an item of the down phase
        contracts; 64, 128 or 256, divides H and I.
      slots: slots in the ring, of 64 * columns weights each; an even number. Fewer are used where
        many tokens need the room.
    """

    columns: int = 256
    slots: int = 6


def default_config(shapes: ExpertShapes, T: int) -> Config:
    """The heuristic: slots of 32 KB, as many as fit."""
    del T
    return Config(
        columns=largest_divisor(np.gcd(shapes.H, shapes.I), _COLUMNS),
    )


def candidate_configs(shapes: ExpertShapes, T: int) -> list[Config]:
    """Configs worth measuring, the default first: ring lengths, and narrower slots in more of them.

    Narrower slots are also more ranges of I: more items for the down phase to deal out, and more
    partial sums to write.
    """
    default = default_config(shapes, T)
    changes = [
        {"slots": 4},
        {"columns": 128, "slots": 6},
        {"columns": 128, "slots": 8},
        {"columns": 128, "slots": 12},
        {"columns": 64, "slots": 16},
    ]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("columns", c.columns, _COLUMNS, "H", H)
    check_tile("columns", c.columns, _COLUMNS, "I", I)
    check_slots("slots", c.slots, _slot_bytes(c, 8), least=4)
    if c.slots % 2:
        raise ValueError(f"config.slots is {c.slots!r}; expected an even number")


def _slot_bytes(config: Config, N: int) -> int:
    """A slot of weights and half a slot of their other operand."""
    return 2 * config.columns * (ROWS + N)


def _slots(config: Config, columns) -> tuple[int, int]:
    """How many slots, and column slots, fit beside the rest of the shared memory."""
    rest = [*columns.scratch_types(), *columns.accumulator_types()]
    used = sum(4 * int(np.prod(ref.shape)) + 1024 for ref in rest) + 2 * 2 * columns.N * ROWS
    room = mosaic.SHARED_MEMORY_BYTES - used
    slots = min(config.slots, room // _slot_bytes(config, columns.N) // 2 * 2)
    room -= slots * _slot_bytes(config, columns.N)
    return slots, min(slots, slots // 2 + room // (2 * config.columns * 2 * columns.N))


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
    """Runs the kernel and adds its partial sums, on checked inputs; shapes as in decode_experts.

    A Grouping is not used: tiles hold a token once, however often it names an expert.
    """
    del grouping
    T = x.shape[0]
    outputs = []
    for start in range(0, T, MOST_TOKENS):
        part = slice(start, min(start + MOST_TOKENS, T))
        partials = partial_sums(
            x[part], weights, expert_ids[part], expert_weights[part], config, interpret
        )
        outputs.append(add_partial_sums(partials))
    return jnp.concatenate(outputs).astype(out_dtype)


def add_partial_sums(partials: jax.Array) -> jax.Array:
    """[splits, T, H] to [T, H], in order; XLA fuses it into what comes next."""
    return functools.reduce(lax.add, list(partials))


def partial_sums(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    config: Config,
    interpret=False,
) -> jax.Array:
    """The layer's output in as many parts as there are ranges of I: [I // columns, T, H] float32.

    For at most MOST_TOKENS tokens; a caller that adds them itself saves a kernel.
    """

    @jax.custom_batching.sequential_vmap  # a grid that fills the GPU cannot be batched
    def call(x, gate_up, down, expert_ids, expert_weights):
        return _partial_sums(x, gate_up, down, expert_ids, expert_weights, config, interpret)

    return call(x, weights.gate_up, weights.down, expert_ids, expert_weights)


def _partial_sums(x, gate_up, down, expert_ids, expert_weights, config: Config, interpret):
    (E, _, I, H), (T, K) = gate_up.shape, expert_ids.shape
    columns = (EveryToken if T <= EVERY_TOKEN_UP_TO else RoutedTokens)(T=T, K=K, E=E)
    slots, column_slots = _slots(config, columns)
    work = Work(
        H=H,
        I=I,
        N=columns.N,
        columns=config.columns,
        slots=slots,
        column_slots=column_slots,
        num_programs=_INTERPRETED_PROGRAMS if interpret else mosaic.core_count(),
    )
    rows, routing = columns.arrays(x, expert_ids, expert_weights, interpret)
    gate_up = gate_up.reshape(E * 2 * I, H)
    down = down.reshape(E * H, I)
    run = _in_two_launches if interpret else _in_one_launch
    partials = run(work, columns, rows, routing, gate_up, down, interpret)
    return partials[:, :T]


def _hidden_type(work: Work, columns):
    return jax.ShapeDtypeStruct((columns.most_tiles * 2 * work.N, work.I), jnp.bfloat16)


def _partials_type(work: Work, columns):
    return jax.ShapeDtypeStruct((work.splits, columns.rows, work.H), jnp.float32)


def _scratch_types(work: Work, columns) -> dict:
    """By the names of Refs, without the barriers."""
    return {
        "tables": columns.scratch_types(),
        "sums": columns.accumulator_types(),
        "weights_smem": plgpu.SMEM(
            (work.slots, ROWS, work.columns), jnp.bfloat16, transforms=OPERAND
        ),
        "columns_smem": plgpu.SMEM(
            (work.column_slots, 2 * work.N, work.columns), jnp.bfloat16, transforms=OPERAND
        ),
        "hidden_smem": plgpu.SMEM((2 * work.N, ROWS), jnp.bfloat16, transforms=OPERAND),
        "gate_up_arrived": plgpu.Barrier(num_arrivals=3, num_barriers=work.slots // 2),
        "down_arrived": plgpu.Barrier(num_barriers=work.slots),
        "hidden_arrived": plgpu.Barrier(num_barriers=work.column_slots),
    }


def _in_one_launch(work: Work, columns, rows, routing, gate_up, down, interpret) -> jax.Array:
    """The partial sums [splits, rows, H]."""
    del interpret

    def kernel(
        rows_gmem, routing_gmem, gate_up_gmem, down_gmem, counter_gmem,
        hidden_gmem, partials_gmem, **scratch,
    ):  # fmt: skip
        refs = Refs(
            rows=rows_gmem,
            routing=routing_gmem,
            gate_up=gate_up_gmem,
            down=down_gmem,
            hidden=hidden_gmem,
            partials=partials_gmem,
            **scratch,
        )
        barrier = functools.partial(mosaic.grid_barrier, counter_gmem, work.num_programs)
        run_both(work, columns, refs, barrier)

    _, partials = plgpu.kernel(
        kernel,
        out_type=(_hidden_type(work, columns), _partials_type(work, columns)),
        grid=(work.num_programs,),
        grid_names=("program",),
        scratch_types=_scratch_types(work, columns),
        kernel_name="streamed",
    )(rows, routing, gate_up, down, mosaic.grid_barrier_counter())
    return partials


def _in_two_launches(work: Work, columns, rows, routing, gate_up, down, interpret) -> jax.Array:
    """The same for interpret mode, which has no barrier of the whole grid."""
    inputs = {"rows": rows, "routing": routing, "gate_up": gate_up}
    hidden = _alone(
        run_gate_up_alone, work, columns, inputs, "hidden", _hidden_type(work, columns), interpret
    )
    inputs = {"routing": routing, "hidden": hidden, "down": down}
    return _alone(
        run_down_alone, work, columns, inputs, "partials", _partials_type(work, columns), interpret
    )


def _alone(phase, work: Work, columns, inputs: dict, output: str, out_type, interpret) -> jax.Array:
    """One phase as a kernel; inputs and the output are by the names of Refs."""

    def kernel(*refs, **scratch):
        gmem = dict(zip((*inputs, output), refs, strict=True))
        phase(work, columns, Refs(**gmem, **scratch))

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(work.num_programs,),
        grid_names=("program",),
        scratch_types=_scratch_types(work, columns),
        kernel_name=f"streamed_{output}",
        interpret=mosaic.interpret_params(interpret),
    )(*inputs.values())
