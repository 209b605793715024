"""A few tokens in f16 terms, as the other operand of FP8 weights.

    bf16       one term: 8 significant bits of f16's 11
    float32    two terms: the number rounded to f16, and what is left of it

f16's exponents are few. So each token is multiplied with a power of two, of that token and 128
columns, which lets its largest number land in [2^14, 2^15). What f16 then cannot hold is below
2^-39 of that number. The products are multiplied with the inverse, in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.device import interpreting
from pallas_kernels.mosaic.lane_code import (
    bits_and,
    constant,
    i32,
    lane_and_warp,
    load_shared,
    shared_pointer,
    shift_left,
    shift_right,
)

COLUMNS = 128  # of a scale block

# [N, COLUMNS] in registers: 4 warps by 2 tokens, 32 lanes by 4 neighbouring columns.
BY_COLUMN = plgpu.Layout.TILED(
    plgpu.Tiling(((8, COLUMNS), (2, 4))), warp_dims=(-4,), lane_dims=(-3,), vector_dim=-1
)
_BY_TOKEN = BY_COLUMN.reduce(1)

EXPONENT = 23  # a float32's exponent field begins at this bit
# The field of the largest number's exponent, at least; a smaller one needs no larger factor.
LEAST_FIELD = 15


def store_operands(blocks: Sequence[tuple[jax.Array, Any, Any]]) -> None:
    """Converts blocks of [N, COLUMNS]; lanes may read them once all lanes have stored theirs.

    Args:
      blocks: of each (tokens, operand, undo):
        tokens: [N, COLUMNS] bf16 or float32 in the layout BY_COLUMN. All blocks' are loaded before
          the first store, because no load would be moved up over one.
        operand: [terms, N, COLUMNS] f16 in shared memory; 1 term for values of bf16, 2 for float32,
          which fp8_tokens asks for only where it is interpreted.
        undo: [N] float32 there; what products of a token are to be multiplied with.
    """
    loaded = [tokens.astype(jnp.float32) for tokens, _, _ in blocks]
    largest = [
        _largest(lax.bitcast_convert_type(tokens, jnp.int32) & jnp.int32(0xFF << EXPONENT))
        for tokens in loaded
    ]
    for tokens, field, (_, operand, undo) in zip(loaded, largest, blocks, strict=True):
        field = jnp.maximum(field, jnp.int32(LEAST_FIELD << EXPONENT))
        # Fields of 2^(14 - e) and 2^(e - 14) for the largest number's e: 268 - field, field - 14.
        factor = jnp.int32((268 << EXPONENT) - (1 << 32)) - field
        factor = lax.broadcast_in_dim(
            lax.bitcast_convert_type(factor, jnp.float32), tokens.shape, (0,)
        )
        rest = tokens * plgpu.layout_cast(factor, BY_COLUMN)
        for term in range(operand.shape[0]):
            converted = rest.astype(jnp.float16)
            _store_term(converted, operand.at[term])
            rest -= converted.astype(jnp.float32)
        field -= jnp.int32(14 << EXPONENT)
        _store_undo(lax.bitcast_convert_type(field, jnp.float32), undo)


def _largest(exponents: jax.Array) -> jax.Array:
    """[N, COLUMNS] to the largest of each token, [N]: one instruction where a sum takes five."""
    if interpreting():
        return jnp.max(exponents, axis=1)
    shape = exponents.shape[:1]

    @plgpu.inline_mgpu(
        arg_types=(BY_COLUMN,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=_BY_TOKEN),
    )
    def reduce(_, exponents):
        layout = _BY_TOKEN.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        one = ir.VectorType.get((1,), i32())
        for index, register in enumerate(exponents.registers.flat):
            largest, *others = (vector.extract(register, [], [i]) for i in range(4))
            for other in others:
                largest = arith.maxui(largest, other)
            largest = mgpu.utils.inline_ptx(
                "redux.sync.max.u32 $0, $1, 0xffffffff;",
                largest,
                result_types=i32(),
                convergent=True,
            )
            registers.flat[index] = vector.broadcast(one, largest)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return reduce(exponents)


def _store_term(values: jax.Array, term: Any) -> None:
    """Stores [N, COLUMNS] where the lanes that multiply them load 16 bytes each.

    In units of 16 bytes, unit (tile * 4 + j) * 32 + lane holds columns 8 j .. 8 j + 7 of that
    lane's 32, for tiles of 8 tokens. Lanes are permuted within 8 by j, so that no two stores at a
    time meet in a bank.
    """
    if interpreting():
        term[...] = values
        return

    @plgpu.inline_mgpu(arg_types=(BY_COLUMN, plgpu.RefType()))
    def store(_, values, term):
        lane, warp = lane_and_warp()
        q, j = shift_right(lane, 3), bits_and(shift_right(lane, 1), 3)
        half = shift_left(bits_and(lane, 1), 3)
        for row in range(2):
            token = arith.addi(shift_left(warp, 1), constant(row))
            unit = arith.xori(arith.addi(shift_left(token, 2), q), shift_left(j, 1))
            unit = arith.addi(shift_left(j, 5), unit)
            at = arith.addi(arith.addi(shared_pointer(term), shift_left(unit, 4)), half)
            for tile, register in enumerate(values.registers.flat[row::2]):
                words = vector.bitcast(ir.VectorType.get((2,), i32()), register)
                mgpu.utils.inline_ptx(
                    f"st.shared.v2.b32 [$0+{tile * 8 * COLUMNS * 2}], {{$1, $2}};",
                    at,
                    *(vector.extract(words, [], [i]) for i in range(2)),
                    has_side_effects=True,
                )

    store(values, term)


def _store_undo(values: jax.Array, undo: Any) -> None:
    """Stores [N]; Pallas's own store would have all lanes wait."""
    if interpreting():
        undo[...] = values
        return

    @plgpu.inline_mgpu(arg_types=(_BY_TOKEN, plgpu.RefType()))
    def store(_, values, undo):
        _, warp = lane_and_warp()
        at = arith.addi(shared_pointer(undo), shift_left(warp, 3))
        for index, register in enumerate(values.registers.flat):
            mgpu.utils.inline_ptx(
                f"st.shared.f32 [$0+{4 * (8 * (index // 2) + index % 2)}], $1;",
                at,
                vector.extract(register, [], [0]),
                has_side_effects=True,
            )

    store(values, undo)


def load_terms(operand: Any, terms: int, rows: int, tile: int) -> list[list]:
    """Of each term the lane's 32 columns of its token, one of a tile of 8, in 16 registers.

    Lanes whose token has no row take the last one's.
    """
    lane, _ = lane_and_warp()
    of_tile = min(rows, 8)
    if of_tile < 8:
        last = arith.ori(bits_and(lane, 3), constant(4 * (of_tile - 1)))
        lane = arith.minui(lane, last)
    base = shared_pointer(operand)
    places = [arith.addi(base, shift_left(arith.xori(lane, constant(2 * j)), 4)) for j in range(4)]

    def words_of(term):
        first, unit = 2 * COLUMNS * (rows * term + 8 * tile), 64 * of_tile
        return [
            word for j, at in enumerate(places) for word in load_shared(at, first + unit * j, 4)
        ]

    return [words_of(term) for term in range(terms)]


def load_undo(undo: Any, N: int) -> list[list]:
    """Of each 8 tokens the factors of the lane's two."""
    lane, _ = lane_and_warp()
    at = arith.addi(shared_pointer(undo), shift_left(bits_and(lane, 3), 3))
    return [load_shared(at, 32 * tile, 2, "f32") for tile in range(N // 8)]
