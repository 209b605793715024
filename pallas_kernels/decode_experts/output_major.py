"""The output-major layout (warp decode): one thread block for a few neurons of one token.

    gate/up   block (token t, its k-th expert, block_m neurons) reads 2 block_m rows of gate_up[e]
              hidden[t, k, rows] = w[t, k] * silu(gate_e x_t) * up_e x_t   float32, written once
    down      block (token t, block_m output neurons) reads block_m rows of down[e] for each k
              out[t, rows] = sum over k of down_e hidden[t, k]             float32 throughout

No sorting, no scatter, no combine buffer: a block knows its weight rows from the expert id alone.
An expert that several tokens share is read again for each of them. Blocks that could share a read
are neighbours in the launch order (same neurons, next token), so that the second read may hit L2.

A block is one warpgroup (128 lanes). Weight rows stream through a TMA pipeline in shared memory.
The products run on the CUDA cores, because one vector has no use for the tensor cores' tile. A
row's sum is 64 sums, of the columns that agree modulo 64, kept in registers over all steps and
experts. They are added up once, at the end:

    row r of the weights   | 0 .. 63 | 64 .. 127 | ...        acc[r, c] += row[c] * vector[c]
    acc[r, 0 .. 63]            +=         +=                  sum of acc[r, :], once
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import BlockScaledFp8
from pallas_kernels.decode_experts.configs import (
    Layout,
    check_block,
    check_num_stages,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.row_products import RowProducts, RowScales, values_of
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.weights import ExpertWeights, down_rows, gate_and_up_rows
from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.pipeline import pipeline

_BLOCK_MS = (16, 32, 64)
_BLOCK_KS = (64, 128, 192, 256)  # up to the widest TMA box
# Beyond this number of tokens no config makes up for how often the layout reads an expert.
_TUNED_UP_TO = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputMajorConfig:
    """How output_major cuts the work; nothing here changes a bit of a result on a GPU.

    Attributes:
      gate_up_block_m: neurons of a gate/up block; 16, 32 or 64, divides I.
      gate_up_block_k: columns of x and gate_up in a stage; 64, 128, 192 or 256, divides H. With
        FP8 weights 128 or 256, and so is down_block_k.
      gate_up_num_stages: stages of gate/up.
      down_block_m: output neurons of a down block; 16, 32 or 64, divides H.
      down_block_k: columns of hidden and down in a stage; 64, 128, 192 or 256, divides I.
      down_num_stages: stages of down.
    """

    gate_up_block_m: int = 16
    gate_up_block_k: int = 256
    gate_up_num_stages: int = 4
    down_block_m: int = 16
    down_block_k: int = 256
    down_num_stages: int = 5


def _default_config(shapes: ExpertShapes, T: int) -> OutputMajorConfig:
    """The heuristic: few rows, so that one token fills the GPU, and stages as wide as TMA takes.

    The stages are few, so that several blocks share a core: one waits while another multiplies.
    """
    del T
    block_ks = _block_ks(shapes)
    # Twice the rows are as many bytes in FP8.
    more = {"gate_up_block_m": 32, "down_block_m": 32, "down_num_stages": 4}
    return OutputMajorConfig(
        gate_up_block_k=largest_divisor(shapes.H, block_ks),
        down_block_k=largest_divisor(shapes.I, block_ks),
        **(more if shapes.weights == "fp8" else {}),
    )


def _candidates(shapes: ExpertShapes, T: int) -> list[OutputMajorConfig]:
    """Configs worth measuring, the default first, then what has won before.

    More stages have more bytes on their way, fewer let more blocks share a core. Taller tiles read
    x or hidden less often and make fewer blocks.
    """
    default = _default_config(shapes, T)
    if T > _TUNED_UP_TO:
        return [default]
    shorter, tall_down = {"gate_up_num_stages": 3}, {"down_block_m": 32, "down_num_stages": 3}
    tall_gate_up = {"gate_up_block_m": 32, "gate_up_num_stages": 3}
    changes = [tall_down, shorter, shorter | tall_down, {"down_num_stages": 8}, tall_gate_up]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    return valid_configs(_check, configs, shapes)


def _check(config: OutputMajorConfig, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    block_ks, size = _block_ks(shapes), 1 if shapes.weights == "fp8" else 2
    check_block("gate_up_block_m", c.gate_up_block_m, _BLOCK_MS, "I", I)
    check_block("gate_up_block_k", c.gate_up_block_k, block_ks, "H", H)
    check_block("down_block_m", c.down_block_m, _BLOCK_MS, "H", H)
    check_block("down_block_k", c.down_block_k, block_ks, "I", I)
    gate_up_bytes = c.gate_up_block_k * (2 * size * c.gate_up_block_m + 2)  # gate, up; x in bf16
    down_bytes = c.down_block_k * (size * c.down_block_m + 4)  # down; hidden in float32
    check_num_stages("gate_up_num_stages", c.gate_up_num_stages, gate_up_bytes, least=1)
    check_num_stages("down_num_stages", c.down_num_stages, down_bytes, least=1)


def _block_ks(shapes: ExpertShapes) -> tuple[int, ...]:
    """Those that are whole pieces."""
    piece = RowProducts(shapes.weights == "fp8").piece
    return tuple(block_k for block_k in _BLOCK_KS if block_k % piece == 0)


def gate_up_block(block_id, num_assignments: int):
    """Which work a gate/up block does: (assignment t * K + k, part of the neurons).

    With 16 assignments, block 35 does part 2 of assignment 3. Plain integer arithmetic, for Python
    ints, numpy arrays and traced scalars alike.
    """
    return block_id % num_assignments, block_id // num_assignments


def down_block(block_id, num_tokens: int):
    """Which work a down block does: (token t, part of the output neurons)."""
    return block_id % num_tokens, block_id // num_tokens


@functools.partial(jax.jit, static_argnames=("config", "out_dtype", "interpret"))
def _run(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    config: OutputMajorConfig,
    out_dtype,
    interpret,
) -> jax.Array:
    """Runs both launches on checked inputs; shapes as in decode_experts."""
    T, H = x.shape
    K = expert_ids.shape[1]
    ids = expert_ids.reshape(T * K)
    routing_weights = expert_weights.reshape(T * K)
    E, _, I, _ = weights.gate_up.shape
    stored = weights.as_rows()
    hidden = _gate_up(ids, routing_weights, x, stored.gate_up, K, E, I, config, interpret)
    return _down(ids, hidden, stored.down, T, E, H, config, out_dtype, interpret)


def _gate_up(
    ids, routing_weights, x, gate_up, K: int, E: int, I: int, config: OutputMajorConfig, interpret
) -> jax.Array:
    """hidden[a] = w[a] * silu(gate_e x_t) * up_e x_t of each assignment a = t * K + k.

    [TK, I] float32. The rows of a padded assignment stay unwritten; _down does not read them.
    """
    TK, H = ids.shape[0], x.shape[1]
    block_m, block_k = config.gate_up_block_m, config.gate_up_block_k
    num_stages = config.gate_up_num_stages
    rows = RowProducts(isinstance(gate_up, BlockScaledFp8))
    scales = RowScales(2, H)

    def kernel(
        block_id, ids_gmem, weights_gmem, x_gmem, gate_up_gmem, hidden_gmem,
        gate_smem, up_smem, x_smem, full, scales_smem=None,
    ):  # fmt: skip
        assignment, part = gate_up_block(block_id, TK)
        token = assignment // K
        expert = ids_gmem[assignment]
        values = values_of(gate_up_gmem)

        @pl.when((expert >= 0) & (expert < E))
        def _():
            weight = weights_gmem[assignment]
            first_rows = gate_and_up_rows(expert, part, block_m, I)
            gate_rows, up_rows = (pl.ds(row, block_m) for row in first_rows)

            def load(step, stage, full):
                at = pl.ds(step * block_k, block_k)
                copy_evict_first(values.at[gate_rows, at], gate_smem.at[stage], full)
                copy_evict_first(values.at[up_rows, at], up_smem.at[stage], full)
                copy_evict_first(x_gmem.at[token, at], x_smem.at[stage], full)

            def compute(step, stage, sums):
                gate, up = sums
                pieces = rows.pieces(block_k)
                for index, piece in enumerate(pieces):
                    gate_scale, up_scale = (
                        scales.at(gate_up_gmem, half, step * len(pieces) + index, scales_smem)
                        for half in range(2)
                    )
                    x_piece = rows.load_vector(x_smem.at[stage, piece])
                    gate += rows.products(gate_smem.at[stage, :, piece], x_piece, gate_scale)
                    up += rows.products(up_smem.at[stage, :, piece], x_piece, up_scale)
                return gate, up  # [block_m, piece] each

            gate, up = pipeline(
                H // block_k,
                num_stages,
                full=full,
                load=load,
                compute=compute,
                init=(rows.zeros(block_m), rows.zeros(block_m)),
                between=lambda: scales.load(gate_up_gmem, first_rows, scales_smem),
            )
            gate, up = rows.along_rows(gate), rows.along_rows(up)
            hidden = gate / (1 + jnp.exp(-gate)) * up * weight
            hidden_gmem[assignment, pl.ds(part * block_m, block_m)] = hidden

    return launch(
        kernel,
        name="output_major_gate_up",
        num_blocks=TK * (I // block_m),
        out_type=jax.ShapeDtypeStruct((TK, I), jnp.float32),
        scratch_types=[
            plgpu.SMEM((num_stages, block_m, block_k), rows.dtype),
            plgpu.SMEM((num_stages, block_m, block_k), rows.dtype),
            plgpu.SMEM((num_stages, block_k), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=3, num_barriers=num_stages),
            *scales.shared_types(gate_up),
        ],
        interpret=interpret,
    )(ids, routing_weights, x, gate_up)


def _down(
    ids, hidden, down, T: int, E: int, H: int, config: OutputMajorConfig, out_dtype, interpret
) -> jax.Array:
    """out[t] = sum over k of down_e hidden[t, k]: [T, H], each element written once."""
    I = hidden.shape[1]
    K = ids.shape[0] // T
    block_m, block_k = config.down_block_m, config.down_block_k
    num_stages, steps_per_expert = config.down_num_stages, I // config.down_block_k
    rows = RowProducts(isinstance(down, BlockScaledFp8))
    scales = RowScales(K, I)

    def kernel(
        block_id, ids_gmem, hidden_gmem, down_gmem, out_gmem,
        down_smem, hidden_smem, full, scales_smem=None,
    ):  # fmt: skip
        token, part = down_block(block_id, T)
        values = values_of(down_gmem)

        def assignment_of(step):
            return token * K + step // steps_per_expert

        def first_row(assignment):
            return down_rows(ids_gmem[assignment], part, block_m, H)

        def active(step):  # padding is skipped: neither its hidden nor any weight is read
            expert = ids_gmem[assignment_of(step)]
            return (expert >= 0) & (expert < E)

        def load(step, stage, full):
            assignment = assignment_of(step)
            block = pl.ds(first_row(assignment), block_m)
            at = pl.ds(step % steps_per_expert * block_k, block_k)
            copy_evict_first(values.at[block, at], down_smem.at[stage], full)
            copy_evict_first(hidden_gmem.at[assignment, at], hidden_smem.at[stage], full)

        def load_scales():
            # Of padding those of any expert's, because none is multiplied.
            assignments = [token * K + k for k in range(K)]
            safe = [jnp.clip(ids_gmem[a], 0, E - 1) for a in assignments]
            first = [down_rows(expert, part, block_m, H) for expert in safe]
            scales.load(down_gmem, first, scales_smem)

        def compute(step, stage, sums):
            pieces = rows.pieces(block_k)
            k, of_expert = step // steps_per_expert, step % steps_per_expert
            for index, piece in enumerate(pieces):
                scale = scales.at(down_gmem, k, of_expert * len(pieces) + index, scales_smem)
                hidden_piece = rows.load_vector(hidden_smem.at[stage, piece])
                sums += rows.products(down_smem.at[stage, :, piece], hidden_piece, scale)
            return sums  # [block_m, piece]

        sums = pipeline(
            K * steps_per_expert,
            num_stages,
            full=full,
            load=load,
            compute=compute,
            init=rows.zeros(block_m),
            active=active,
            between=load_scales if rows.quantised else None,
        )
        out_gmem[token, pl.ds(part * block_m, block_m)] = rows.along_rows(sums).astype(out_dtype)

    return launch(
        kernel,
        name="output_major_down",
        num_blocks=T * (H // block_m),
        out_type=jax.ShapeDtypeStruct((T, H), out_dtype),
        scratch_types=[
            plgpu.SMEM((num_stages, block_m, block_k), rows.dtype),
            plgpu.SMEM((num_stages, block_k), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
            *scales.shared_types(down),
        ],
        interpret=interpret,
    )(ids, hidden, down)


OUTPUT_MAJOR = Layout(
    name="output_major",
    capabilities=(9, 10),  # the copy engine, and no tensor cores
    # A row's sums know neither how many rows nor how many columns came with them.
    sum_order="by_lane",
    Config=OutputMajorConfig,
    default_config=_default_config,
    candidates=_candidates,
    check=_check,
    run=_run,
)
