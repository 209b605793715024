"""Phases 1 and 2 of the router: RMSNorm, and the product with the gate."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.warpgroup import row_layout
from pallas_kernels.router.work import COLUMNS, ROWS, Refs, Work

_SWIZZLE = plgpu.SwizzleTransform(128)
_OPERAND = (plgpu.TilingTransform((8, 64)), _SWIZZLE)


def product_scratch(work: Work, rows: int) -> dict[str, Any]:
    """Shared memory of start_gate and multiply: a slot for each piece, none used twice.

    Args:
      work: how the call is cut.
      rows: of the array that multiply copies the tokens from: T, or N.
    """
    slots = work.slots
    x_smem = functools.partial(plgpu.SMEM, (slots, work.N, COLUMNS), jnp.bfloat16)
    tiles = x_smem(transforms=_OPERAND)
    return {
        "gate_smem": plgpu.SMEM((slots, ROWS, COLUMNS), jnp.bfloat16, transforms=_OPERAND),
        "x_smem": plgpu.RefUnion(tiles, x_smem(transforms=(_SWIZZLE,))) if rows % 8 else tiles,
        "gate_arrived": plgpu.Barrier(num_barriers=slots),
        "x_arrived": plgpu.Barrier(num_barriers=slots),
    }


def normalise(work: Work, refs: Refs, program) -> None:
    """normed[t] = norm_weight * bf16(x[t] / rms(x[t])), for this program's tokens."""

    def load(ref):
        row = plgpu.load(ref, layout=row_layout(work.H), optimized=False)
        return row.astype(jnp.float32)

    def one_token(index, _):
        token = program + index * work.num_programs
        x, norm_weight = load(refs.x.at[token]), load(refs.norm_weight)
        scale = lax.rsqrt(jnp.sum(x * x) / work.H + work.norm_eps)
        rounded = (x * scale).astype(jnp.bfloat16).astype(jnp.float32)
        refs.normed[token] = (norm_weight * rounded).astype(jnp.bfloat16)
        return ()

    lax.fori_loop(0, work.share(program, work.T), one_token, ())


def start_gate(work: Work, refs: Refs, program) -> None:
    """Starts the copies of all this program's gate rows; nothing needs to come before."""

    def copy(split, block, piece, slot):
        at = pl.ds((split * work.pieces + piece) * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(
            refs.gate.at[pl.ds(block * ROWS, ROWS), at],
            refs.scratch["gate_smem"].at[slot],
            refs.scratch["gate_arrived"].at[slot],
        )

    _for_each_piece(work, program, copy)


def multiply(work: Work, refs: Refs, tokens, program) -> None:
    """partials[split, t, block] = gate[block, split] tokens[t, split], for this program's units."""
    gate_smem, x_smem = refs.scratch["gate_smem"], refs.scratch["x_smem"]
    target = x_smem
    if tokens.shape[0] % 8:
        # Pallas lets nothing be copied into tiles from an array whose last one is not whole, unless
        # it is the only one. Tiles here are as wide as a piece: without them, rows lie the same.
        x_smem, target = x_smem

    def copy(split, _, piece, slot):
        at = pl.ds((split * work.pieces + piece) * COLUMNS, COLUMNS)
        first = 0 * split  # not a plain 0, for which Pallas would check the bounds of [T, H]
        plgpu.copy_gmem_to_smem(
            tokens.at[pl.ds(first, work.N), at], target.at[slot], refs.scratch["x_arrived"].at[slot]
        )

    _for_each_piece(work, program, copy)

    def add_piece(acc, slot):
        plgpu.barrier_wait(refs.scratch["gate_arrived"].at[slot])
        plgpu.barrier_wait(refs.scratch["x_arrived"].at[slot])
        plgpu.wgmma(acc, gate_smem.at[slot], x_smem.at[slot].transpose((1, 0)))

    def one_unit(index, split, block):
        def sum_up(acc):
            for piece in range(work.pieces):
                add = functools.partial(add_piece, acc, index * work.pieces + piece)
                _if_there_is(work, split, piece, add)

            return acc[...]  # [ROWS, N]

        sums = pl.run_scoped(sum_up, plgpu.ACC((ROWS, work.N), jnp.float32))
        out = refs.partials.at[split, :, pl.ds(block * ROWS, ROWS)].transpose((1, 0))
        out[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)

    for index in range(work.units_a_program):
        exists, split, block = work.unit(program, index)
        pl.when(exists)(functools.partial(one_unit, index, split, block))


def _for_each_piece(work: Work, program, body) -> None:
    def one_unit(index, split, block):
        for piece in range(work.pieces):
            slot = index * work.pieces + piece
            _if_there_is(work, split, piece, functools.partial(body, split, block, piece, slot))

    for index in range(work.units_a_program):
        exists, split, block = work.unit(program, index)
        pl.when(exists)(functools.partial(one_unit, index, split, block))


def _if_there_is(work: Work, split, piece: int, body) -> None:
    """Calls body unless it is the last split and that one has fewer pieces."""
    if work.H // COLUMNS % work.pieces == 0:
        body()
    else:
        pl.when(work.has_piece(split, piece))(body)
