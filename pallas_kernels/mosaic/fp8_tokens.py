"""Tokens from global memory to f16 terms in shared memory, many scale blocks at once.

A warp takes blocks of COLUMNS of its own, 4 neighbouring columns a lane, and leaves out the tokens
that no result is wanted of. Loads come before conversions, a dozen of them at a time on their way.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic.device import interpreting
from pallas_kernels.mosaic.fp8_operand import COLUMNS, EXPONENT, LEAST_FIELD, store_operands
from pallas_kernels.mosaic.lane_code import (
    as_array,
    bits_and,
    constant,
    global_pointer,
    lane_and_warp,
    load_global,
    registers_type,
    shared_pointer,
    shift_left,
    shift_right,
    widened,
    words_of,
)

_WARPS = 4


def load_tokens(tokens: Any, wanted: Sequence[Any], first_block: Any, blocks: int) -> Any:
    """Loads some blocks of COLUMNS of tokens from global memory, for store_tokens.

    Warp w takes blocks w, w + 4, ...; a lane four neighbouring columns of each.

    Args:
      tokens: [T, columns] bf16 or float32 in global memory, which other blocks may have written.
      wanted: of each token whether it is; a bool that all lanes agree on.
      first_block: int32.
      blocks: how many.
    """
    T, dtype = tokens.shape[0], tokens.dtype
    if interpreting():
        return tokens[:, pl.ds(first_block * COLUMNS, blocks * COLUMNS)]
    words = dtype.itemsize  # of four columns
    rounds = -(-blocks // _WARPS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), [plgpu.Layout.WG_SPLAT] * T, plgpu.Layout.WG_SPLAT),
        return_type=registers_type(rounds * T, words),
    )
    def load(_, tokens, wanted, first_block):
        lane, warp = lane_and_warp()
        stride = words * ir.MemRefType(tokens.type).get_strides_and_offset()[0][0]
        places = []
        for block in _blocks_of(warp, blocks):
            at = arith.muli(arith.addi(first_block.registers.item(), block), constant(COLUMNS))
            at = arith.muli(arith.addi(at, shift_left(lane, 2)), constant(words))
            places.append(arith.addi(global_pointer(tokens), widened(at)))
        # Past the first cache, because it may hold what other blocks have written since.
        return as_array(
            [
                load_global(at, row * stride, words, there=flag.registers.item())
                for row, flag in enumerate(wanted)
                for at in places
            ]
        )

    return load(tokens, _flags(wanted), jnp.int32(first_block))


def _flags(wanted: Sequence[Any]) -> list:
    return [jnp.where(flag, jnp.int32(1), jnp.int32(0)) for flag in wanted]


def store_tokens(
    loaded: Any, wanted: Sequence[Any], operand: Any, undo: Any, blocks: int, dtype: Any
) -> None:
    """Converts what load_tokens has loaded; lanes may read it once all lanes have stored theirs.

    Args:
      loaded, wanted, blocks: see load_tokens.
      operand: [blocks, terms, rows, COLUMNS] f16 in shared memory: a row for each token, or an even
        number of fewer than 8. What is there of tokens that are not wanted may be anything.
      undo: [blocks * N] float32 there, what the products of N tokens are to be multiplied with.
      dtype: of the tokens.
    """
    terms, T, N = operand.shape[1], len(wanted), undo.shape[0] // blocks
    if interpreting():
        tokens = loaded.reshape(T, blocks, COLUMNS).transpose(1, 0, 2)
        there = pl.ds(0, T)
        store_operands(
            [
                (tokens[block], operand.at[block, :, there], undo.at[pl.ds(block * N, T)])
                for block in range(blocks)
            ]
        )
        return
    rows, words = operand.shape[2], jnp.dtype(dtype).itemsize
    tile_rows = min(rows, 8)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WG_STRIDED(loaded.shape, words),
            [plgpu.Layout.WG_SPLAT] * T,
            plgpu.RefType(),
            plgpu.RefType(),
        )
    )
    def store(_, loaded, wanted, operand, undo):
        lane, warp = lane_and_warp()
        q, j = shift_right(lane, 3), bits_and(shift_right(lane, 1), 3)
        place = arith.muli(j, constant(64 * tile_rows))
        place = arith.addi(place, shift_left(bits_and(lane, 1), 3))
        # Of even and odd tokens; see fp8_operand's _store_term.
        units = [arith.xori(arith.ori(q, constant(4 * odd)), shift_left(j, 1)) for odd in range(2)]
        bases, undo_places = [], []
        for block in _blocks_of(warp, blocks):
            at = arith.muli(block, constant(2 * COLUMNS * terms * rows))
            at = arith.addi(arith.addi(at, shared_pointer(operand)), place)
            bases.append([arith.addi(at, shift_left(unit, 4)) for unit in units])
            at = arith.muli(block, constant(4 * N))
            undo_places.append(arith.addi(shared_pointer(undo), at))
        registers = iter(loaded.registers.flat)
        for token, flag in enumerate(wanted):
            tile, row = token // 8, token % 8
            first = 2 * COLUMNS * 8 * tile + 128 * (row // 2)
            offsets = [first + 2 * COLUMNS * rows * term for term in range(terms)]
            one = arith.cmpi(arith.CmpIPredicate.ne, flag.registers.item(), constant(0))
            columns = [words_of(next(registers)) for _ in bases]
            with mgpu.utils.when(one):
                for column, ats, undo_at in zip(columns, bases, undo_places, strict=True):
                    values = column if words == 4 else _as_float32(column)
                    _store_scaled(values, ats[row % 2], offsets, undo_at, 4 * token)

    store(loaded, _flags(wanted), operand, undo)


def _blocks_of(warp, blocks: int) -> list:
    """A warp's blocks; beyond the last one that one again, with the same results."""
    found = []
    for first in range(0, blocks, _WARPS):
        block = arith.addi(warp, constant(first))
        if first + _WARPS > blocks:
            block = arith.minui(block, constant(blocks - 1))
        found.append(block)
    return found


def _as_float32(words) -> list:
    """Pairs of bf16 as float32's bits."""
    high = constant(-(1 << 16))
    return [half for word in words for half in (shift_left(word, 16), arith.andi(word, high))]


def _store_scaled(values: list, at, offsets: list[int], undo_at, undo_offset: int) -> None:
    """What store_operands does, of four columns of a token and block; other lanes have the rest."""
    mask = f"0x{0xFF << EXPONENT:x}"
    rest = "".join(f"cvt.f32.f16 back, h{i}; sub.rn.f32 v{i}, v{i}, back;" for i in range(4))
    store_terms = ""
    for term, offset in enumerate(offsets):
        last = term == len(offsets) - 1
        store_terms += f"""
        cvt.rn.f16x2.f32 low, v1, v0;
        cvt.rn.f16x2.f32 high, v3, v2;
        st.shared.v2.b32 [$4+{offset}], {{low, high}};
        {"" if last else "mov.b32 {h0, h1}, low; mov.b32 {h2, h3}, high;" + rest}"""
    mgpu.utils.inline_ptx(
        f"""{{
        .reg .b16 h<4>;
        .reg .b32 e<4>, field, low, high;
        .reg .f32 v<4>, factor, back;
        and.b32 e0, $0, {mask}; and.b32 e1, $1, {mask};
        and.b32 e2, $2, {mask}; and.b32 e3, $3, {mask};
        max.u32 e0, e0, e1; max.u32 e2, e2, e3; max.u32 e0, e0, e2;
        redux.sync.max.u32 field, e0, 0xffffffff;
        max.u32 field, field, {LEAST_FIELD << EXPONENT};
        sub.u32 e0, {268 << EXPONENT & 0xFFFFFFFF}, field;
        mov.b32 factor, e0;
        mov.b32 v0, $0; mov.b32 v1, $1; mov.b32 v2, $2; mov.b32 v3, $3;
        mul.rn.f32 v0, v0, factor; mul.rn.f32 v1, v1, factor;
        mul.rn.f32 v2, v2, factor; mul.rn.f32 v3, v3, factor;
        {store_terms}
        sub.u32 field, field, {14 << EXPONENT};
        st.shared.b32 [$5+{undo_offset}], field;
        }}""",
        *values,
        at,
        undo_at,
        has_side_effects=True,
        convergent=True,
    )
