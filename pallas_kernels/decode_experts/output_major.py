"""The output-major layout (warp decode): one worker for a few neurons of one token.

    gate/up   worker (token t, its k-th expert, R neurons) reads 2 R rows of gate_up[e]
              hidden[t, k, rows] = w[t, k] * silu(gate_e x_t) * up_e x_t   float32, written once
    down      worker (token t, R output neurons) reads R rows of down[e] for each k
              out[t, rows] = sum over k of down_e hidden[t, k]             float32 throughout

No sorting, no scatter, no combine buffer: a worker knows its weight rows from the expert id alone.
An expert that several tokens share is read again for each of them. Workers that could share a read
are neighbours in the launch order (same neurons, next token), so that the second read may hit L2.

A worker is one warpgroup (128 lanes). Weight rows stream through a TMA ring in shared memory; the
products run on the CUDA cores, since one vector has no use for the tensor cores' tile. A row's sum
is 64 sums, of the columns that agree modulo 64, kept in registers over all steps and experts; they
are added up once, at the end:

    row r of the weights   | 0 .. 63 | 64 .. 127 | ...        acc[r, c] += row[c] * vector[c]
    acc[r, 0 .. 63]            +=         +=                  sum of acc[r, :], once
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.configs import (
    check_slots,
    check_tile,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.weights import (
    ExpertShapes,
    ExpertWeights,
    down_rows,
    gate_and_up_rows,
)
from pallas_kernels.l2_hints import copy_evict_first
from pallas_kernels.mosaic import interpret_params, tma_ring

# How a weight tile lies in registers: 4 warps by 4 rows, 8 lanes along a row, 8 neighbouring
# columns (16 bytes of bf16) in each lane. A row's last sum is three shuffles among 8 lanes.
_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 8))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)
_ALONG_COLUMNS = _TILE.reduce(0)
_ALONG_ROWS = _TILE.reduce(1)

CAPABILITIES = (9, 10)  # the copy engine, and no tensor cores

_ROWS = (16, 32, 64)
_COLUMNS = (64, 128, 192, 256)  # a TMA box has at most 256 elements a side

# A row's sums know neither how many rows nor how many columns came with them.
SUM_ORDER = "by_lane"
_PIECE = 64  # columns whose products go to sums of their own
# Beyond so many tokens this layout reads experts so often that no config can make up for it.
_TUNED_UP_TO = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How output_major cuts the work; nothing here changes a bit of a result on a GPU.

    Attributes:
      gate_up_rows: R of the gate/up launch; 16, 32 or 64.
      gate_up_columns: columns of x and gate_up in a ring slot; 64, 128, 192 or 256, divides H.
      gate_up_slots: slots in the gate/up ring.
      down_rows: R of the down launch; 16, 32 or 64.
      down_columns: columns of hidden and down in a ring slot; 64, 128, 192 or 256, divides I.
      down_slots: slots in the down ring.
    """

    gate_up_rows: int = 16
    gate_up_columns: int = 256
    gate_up_slots: int = 4
    down_rows: int = 16
    down_columns: int = 256
    down_slots: int = 5


def default_config(shapes: ExpertShapes, T: int) -> Config:
    """The heuristic: few rows, so that one token fills the GPU, and slots as wide as TMA takes.

    The rings are short, so that several workers share an SM: one waits while another multiplies.
    """
    del T
    return Config(
        gate_up_columns=largest_divisor(shapes.H, _COLUMNS),
        down_columns=largest_divisor(shapes.I, _COLUMNS),
    )


def candidate_configs(shapes: ExpertShapes, T: int) -> list[Config]:
    """Configs worth measuring, the default first, then what has won before.

    Longer rings have more bytes on their way, shorter ones let more workers share an SM; taller
    tiles read x or hidden less often and make fewer workers.
    """
    default = default_config(shapes, T)
    if T > _TUNED_UP_TO:
        return [default]
    shorter, tall_down = {"gate_up_slots": 3}, {"down_rows": 32, "down_slots": 3}
    tall_gate_up = {"gate_up_rows": 32, "gate_up_slots": 3}
    changes = [tall_down, shorter, shorter | tall_down, {"down_slots": 8}, tall_gate_up]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(check_config, configs, shapes)


def check_config(config: Config, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    check_tile("gate_up_rows", c.gate_up_rows, _ROWS, "I", I)
    check_tile("gate_up_columns", c.gate_up_columns, _COLUMNS, "H", H)
    check_tile("down_rows", c.down_rows, _ROWS, "H", H)
    check_tile("down_columns", c.down_columns, _COLUMNS, "I", I)
    gate_up_slot = c.gate_up_columns * (2 * 2 * c.gate_up_rows + 2)  # gate, up and x, bf16
    down_slot = c.down_columns * (2 * c.down_rows + 4)  # down in bf16, hidden in float32
    check_slots("gate_up_slots", c.gate_up_slots, gate_up_slot, least=1)
    check_slots("down_slots", c.down_slots, down_slot, least=1)


def gate_up_worker(worker, num_assignments: int):
    """Which work a gate/up worker does: (assignment t * K + k, block of R neurons).

    Plain integer arithmetic, for Python ints, numpy arrays and traced scalars alike.
    """
    return worker % num_assignments, worker // num_assignments


def down_worker(worker, num_tokens: int):
    """Which work a down worker does: (token t, block of R output neurons)."""
    return worker % num_tokens, worker // num_tokens


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
    """Runs both launches on checked inputs; shapes as in decode_experts."""
    T, H = x.shape
    E, _, I, _ = weights.gate_up.shape
    K = expert_ids.shape[1]
    ids = expert_ids.reshape(T * K)
    routing_weights = expert_weights.reshape(T * K)
    gate_up = weights.gate_up.reshape(E * 2 * I, H)
    hidden = _gate_up(ids, routing_weights, x, gate_up, K, I, config, interpret)
    down = weights.down.reshape(E * H, I)
    return _down(ids, hidden, down, T, H, config, out_dtype, interpret)


def _gate_up(
    ids, routing_weights, x, gate_up, K: int, I: int, config: Config, interpret
) -> jax.Array:
    """hidden[a] = w[a] * silu(gate_e x_t) * up_e x_t of each assignment a = t * K + k.

    [TK, I] float32. The rows of a padded assignment stay unwritten; _down does not read them.
    """
    TK, H = ids.shape[0], x.shape[1]
    E = gate_up.shape[0] // (2 * I)
    R, columns, slots = config.gate_up_rows, config.gate_up_columns, config.gate_up_slots

    def kernel(
        ids_gmem, weights_gmem, x_gmem, gate_up_gmem, hidden_gmem,
        gate_smem, up_smem, x_smem, barrier,
    ):  # fmt: skip
        assignment, block = gate_up_worker(lax.axis_index("worker"), TK)
        token = assignment // K
        expert = ids_gmem[assignment]

        @pl.when((expert >= 0) & (expert < E))
        def _():
            weight = weights_gmem[assignment]
            gate_row, up_row = gate_and_up_rows(expert, block, R, I)
            gate_rows, up_rows = pl.ds(gate_row, R), pl.ds(up_row, R)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                copy_evict_first(gate_up_gmem.at[gate_rows, at], gate_smem.at[slot], arrived)
                copy_evict_first(gate_up_gmem.at[up_rows, at], up_smem.at[slot], arrived)
                copy_evict_first(x_gmem.at[token, at], x_smem.at[slot], arrived)

            def consume(_, slot, sums):
                gate, up = sums
                for piece in _pieces(columns):
                    x_piece = plgpu.load(x_smem.at[slot, piece], layout=_ALONG_COLUMNS)
                    gate += _products(gate_smem.at[slot, :, piece], x_piece)
                    up += _products(up_smem.at[slot, :, piece], x_piece)
                return gate, up  # [R, _PIECE] each

            gate, up = tma_ring(
                H // columns,
                slots,
                barrier=barrier,
                copy=copy,
                consume=consume,
                init=(_zeros(R), _zeros(R)),
            )
            gate, up = _along_rows(gate), _along_rows(up)
            hidden = gate / (1 + jnp.exp(-gate)) * up * weight
            hidden_gmem[assignment, pl.ds(block * R, R)] = hidden

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((TK, I), jnp.float32),
        grid=(TK * (I // R),),
        grid_names=("worker",),
        scratch_types=[
            plgpu.SMEM((slots, R, columns), jnp.bfloat16),
            plgpu.SMEM((slots, R, columns), jnp.bfloat16),
            plgpu.SMEM((slots, columns), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        ],
        kernel_name="output_major_gate_up",
        interpret=interpret_params(interpret),
    )(ids, routing_weights, x, gate_up)


def _down(ids, hidden, down, T: int, H: int, config: Config, out_dtype, interpret) -> jax.Array:
    """out[t] = sum over k of down_e hidden[t, k]: [T, H], each element written once."""
    I = hidden.shape[1]
    K, E = ids.shape[0] // T, down.shape[0] // H
    R, columns, slots = config.down_rows, config.down_columns, config.down_slots
    steps_an_expert = I // columns

    def kernel(ids_gmem, hidden_gmem, down_gmem, out_gmem, down_smem, hidden_smem, barrier):
        token, block = down_worker(lax.axis_index("worker"), T)

        def assignment_of(step):
            return token * K + step // steps_an_expert

        def active(step):  # padding is skipped: neither its hidden nor any weight is read
            expert = ids_gmem[assignment_of(step)]
            return (expert >= 0) & (expert < E)

        def copy(step, slot, arrived):
            assignment = assignment_of(step)
            rows = pl.ds(down_rows(ids_gmem[assignment], block, R, H), R)
            at = pl.ds(step % steps_an_expert * columns, columns)
            copy_evict_first(down_gmem.at[rows, at], down_smem.at[slot], arrived)
            copy_evict_first(hidden_gmem.at[assignment, at], hidden_smem.at[slot], arrived)

        def consume(_, slot, sums):
            for piece in _pieces(columns):
                # 8 float32 in a lane are two loads, which Mosaic does not count as optimised.
                hidden_piece = plgpu.load(
                    hidden_smem.at[slot, piece], layout=_ALONG_COLUMNS, optimized=False
                )
                sums += _products(down_smem.at[slot, :, piece], hidden_piece)
            return sums  # [R, _PIECE]

        sums = tma_ring(
            K * steps_an_expert,
            slots,
            barrier=barrier,
            copy=copy,
            consume=consume,
            init=_zeros(R),
            active=active,
        )
        out_gmem[token, pl.ds(block * R, R)] = _along_rows(sums).astype(out_dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, H), out_dtype),
        grid=(T * (H // R),),
        grid_names=("worker",),
        scratch_types=[
            plgpu.SMEM((slots, R, columns), jnp.bfloat16),
            plgpu.SMEM((slots, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ],
        kernel_name="output_major_down",
        interpret=interpret_params(interpret),
    )(ids, hidden, down)


def _pieces(columns: int) -> list:
    return [pl.ds(start, _PIECE) for start in range(0, columns, _PIECE)]


def _zeros(R: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((R, _PIECE), jnp.float32), _TILE)


def _products(rows_smem, vector: jax.Array) -> jax.Array:
    """[R, _PIECE] bf16 in shared memory times [_PIECE] in registers: [R, _PIECE] float32."""
    rows = plgpu.load(rows_smem, layout=_TILE).astype(jnp.float32)
    spread = lax.broadcast_in_dim(vector.astype(jnp.float32), rows.shape, (1,))
    return rows * plgpu.layout_cast(spread, _TILE)


def _along_rows(sums: jax.Array) -> jax.Array:
    """[R, _PIECE] to [R]."""
    return plgpu.layout_cast(jnp.sum(sums, axis=1), _ALONG_ROWS)
