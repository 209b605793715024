"""One scale block of FP8 weights times tokens in f16 terms: warp-level products from registers.

The order of columns inside a product is free as long as both operands agree. So a lane takes 32
neighbouring columns of a row, in two 16-byte loads, where the instruction's own order would take
sixteen of 2 bytes:

    lane 4 r + q of a warp    weights   row r, columns 32 q .. 32 q + 31
                              tokens    token r, the same columns
    k16-step s of 8           columns 32 q + 4 s .. 32 q + 4 s + 3 of each of the four q

A warp takes 8 rows of each group of 32; two groups are one product of 16 rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.device import interpreting
from pallas_kernels.mosaic.fp8_operand import (
    COLUMNS,
    load_terms,
    load_undo,
)
from pallas_kernels.mosaic.lane_code import (
    VECTOR,
    as_array,
    bits_and,
    constant,
    global_pointer,
    i32,
    lane_and_warp,
    load_shared,
    registers_type,
    shared_pointer,
    shift_left,
    shift_right,
    widened,
    words_of,
)

GROUP = 32  # rows of weights whose products are one array; there are two groups or more

# [GROUP, N] in registers: 4 warps by 8 rows, 4 lanes by 2 tokens.
ROWS_BY_TOKEN = plgpu.Layout.TILED(
    plgpu.Tiling(((GROUP, 8), (8, 8), (2,), (1,))),
    warp_dims=(-6,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)
TOKENS = ROWS_BY_TOKEN.reduce(0)

_FEW_TOKENS = 16  # counted once a term
_CHAINS = 2
_TRANSFORMS = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))


def weights_type(num_stages: int, parts: int, rows: int, block_k: int) -> Any:
    """Shared memory of e4m3 from which the products read, [num_stages, parts, rows of it, block_k].

    The copy engine fills several parts at once, from places that are equally far apart.
    """
    shape = (num_stages, parts, rows // parts, block_k)
    return plgpu.SMEM(shape, jnp.float8_e4m3fn, transforms=_TRANSFORMS)


def weights_in_registers(weights_smem: Any) -> Any:
    """All weights of a scale block, in registers; sync_lanes may wait until all lanes have them.

    Args:
      weights_smem: [parts, rows, COLUMNS] e4m3, see weights_type; all rows make the groups.
    """
    if interpreting():
        return weights_smem[...].astype(jnp.float32).reshape(-1, COLUMNS)
    parts, rows, _ = weights_smem.shape
    groups = parts * rows // GROUP

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_TRANSFORMS),), return_type=registers_type(2 * groups, VECTOR)
    )
    def load(_, weights):
        row_stride = ir.MemRefType(weights.type).get_strides_and_offset()[0][1]
        lane, warp = lane_and_warp()
        row, q = shift_right(lane, 2), bits_and(lane, 3)
        unit = arith.xori(shift_left(q, 1), row)
        place = arith.addi(shift_left(row, 7), shift_left(unit, 4))
        base = arith.addi(shared_pointer(weights), arith.muli(warp, constant(row_stride)))
        places = [arith.addi(base, place), arith.addi(base, arith.xori(place, constant(16)))]
        return as_array(
            [load_shared(at, 4 * group * row_stride, 4) for group in range(groups) for at in places]
        )

    return load(weights_smem)


def add_products(
    totals: Sequence[jax.Array],
    weights: Any,
    operand: Any,
    undo: Any,
    scales: Sequence[jax.Array],
) -> list[jax.Array]:
    """Totals + scale * (weights @ tokens.T), of each group of rows.

    Args:
      totals: of each group [GROUP, N] float32 in the layout ROWS_BY_TOKEN.
      weights: see weights_in_registers.
      operand: [terms, rows, COLUMNS] f16, see fp8_tokens and fp8_operand. Sums of tokens that
        have no row may be anything.
      undo: [N] float32, likewise.
      scales: of each group a float32.
    """
    N = totals[0].shape[1]
    if interpreting():
        # Tokens without a row take the last one's, as in load_terms.
        rows = jnp.minimum(jnp.arange(N), operand.shape[1] - 1)
        tokens = operand[...].astype(jnp.float32)[:, rows]
        factors = undo[...]

        def product(group):
            rows = weights[group * GROUP : (group + 1) * GROUP]
            return sum(jnp.dot(rows, term.T, precision=lax.Precision.HIGHEST) for term in tokens)

        return [
            total + product(group) * (scale * factors)
            for group, (total, scale) in enumerate(zip(totals, scales, strict=True))
        ]

    terms, rows, _ = operand.shape
    groups = len(totals)
    type_of_total = plgpu.ShapeDtypeStruct((GROUP, N), jnp.float32, layout=ROWS_BY_TOKEN)

    @plgpu.inline_mgpu(
        arg_types=(
            [ROWS_BY_TOKEN] * groups,
            plgpu.Layout.WG_STRIDED(weights.shape, VECTOR),
            plgpu.RefType(),
            plgpu.RefType(),
            [plgpu.Layout.WG_SPLAT] * groups,
        ),
        return_type=[type_of_total] * groups,
    )
    def add(_, totals, weights, operand, undo, scales):
        tiles = range(N // 8)
        # Where they are few, a token's columns stay in registers for all rows.
        few = N * terms <= _FEW_TOKENS
        kept = [load_terms(operand, terms, rows, tile) for tile in tiles] if few else None
        factors = load_undo(undo, N)
        found = []
        for first in range(0, groups, 2):
            of_rows = [_as_f16(weights.registers[2 * g : 2 * g + 2]) for g in (first, first + 1)]
            registers = [totals[group].registers.flatten() for group in (first, first + 1)]
            for tile in tiles:
                tokens = kept[tile] if few else load_terms(operand, terms, rows, tile)
                product = _product(of_rows, tokens)
                for index, number in enumerate(product):
                    half, at = index // 2, 2 * tile + index % 2
                    registers[half][at] = _multiply_add(
                        number,
                        scales[first + half].registers.item(),
                        factors[tile][index % 2],
                        registers[half][at],
                    )
            for total, found_registers in zip(totals[first : first + 2], registers, strict=True):
                found.append(
                    mgpu.FragmentedArray(
                        _registers=found_registers.reshape(total.registers.shape),
                        _layout=total.layout,
                        _is_signed=None,
                    )
                )
        return found

    return add(list(totals), weights, operand, undo, list(scales))


def _as_f16(vectors) -> list:
    """The lane's row of a group, as f16: 16 registers."""
    return [pair for vector_ in vectors for word in words_of(vector_) for pair in _to_f16(word)]


def _to_f16(word) -> tuple:
    """Four e4m3 to two registers of two f16; every value is exact, NaN stays NaN."""
    return mgpu.utils.inline_ptx(
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        word,
        result_types=[i32(), i32()],
    )


def _product(rows: list[list], terms: list[list]) -> list:
    """[16, 8] sums over COLUMNS: of two rows, two tokens each.

    A product waits for the one before. So there are two sums for each term, of the even and of the
    odd steps. They are added from the smallest term on.
    """
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    chains = [[[zero] * 4 for _ in range(_CHAINS)] for _ in terms]
    for step in range(COLUMNS // 16):
        low, high = 2 * step, 2 * step + 1
        for tokens, chain in zip(terms, chains, strict=True):
            chain[step % _CHAINS] = mgpu.utils.inline_ptx(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                rows[0][low],
                rows[1][low],
                rows[0][high],
                rows[1][high],
                tokens[low],
                tokens[high],
                *chain[step % _CHAINS],
                result_types=[f32] * 4,
                convergent=True,
            )
    total, *others = (sums for chain in reversed(chains) for sums in chain)
    for sums in others:
        total = [arith.addf(t, s) for t, s in zip(total, sums, strict=True)]
    return total


def _multiply_add(product, scale, factor, register):
    """Register + product * (scale * factor); the factor is a power of two, so one rounding."""
    total = vector.extract(register, [], [0])
    total = mgpu.utils.inline_ptx(
        "fma.rn.f32 $0, $1, $2, $3;",
        product,
        arith.mulf(scale, factor),
        total,
        result_types=ir.F32Type.get(),
    )
    return vector.broadcast(register.type, total)


def store_column(groups: Sequence[jax.Array], column: Any, row: Any) -> None:
    """Stores one token's sums of all groups, from registers to neighbours in global memory.

    Args:
      groups: of each [GROUP, N] float32 in the layout ROWS_BY_TOKEN.
      column: the token, an int or int32.
      row: [1, groups * GROUP] float32 in global memory.
    """
    if interpreting():
        sums = [lax.dynamic_index_in_dim(group, column, 1, keepdims=False) for group in groups]
        row[0] = jnp.concatenate(sums)
        return

    @plgpu.inline_mgpu(
        arg_types=([ROWS_BY_TOKEN] * len(groups), plgpu.Layout.WG_SPLAT, plgpu.RefType())
    )
    def store(_, groups, column, row):
        column = column.registers.item()
        lane, warp = lane_and_warp()
        neuron = arith.addi(shift_left(warp, 3), shift_right(lane, 2))
        at = arith.addi(global_pointer(row), widened(shift_left(neuron, 2)))
        # Registers 2 t and 2 t + 1 are tokens 8 t + 2 q and 8 t + 2 q + 1.
        index = arith.ori(shift_left(shift_right(column, 3), 1), bits_and(column, 1))
        q = bits_and(shift_right(column, 1), 3)
        has_it = arith.cmpi(arith.CmpIPredicate.eq, bits_and(lane, 3), q)
        for number, group in enumerate(groups):
            value, *others = (vector.extract(r, [], [0]) for r in group.registers.flat)
            for place, other in enumerate(others, start=1):
                is_it = arith.cmpi(arith.CmpIPredicate.eq, index, constant(place))
                value = arith.select(is_it, other, value)
            mgpu.utils.inline_ptx(
                f"st.relaxed.gpu.global.f32 [$0+{4 * GROUP * number}], $1;",
                at,
                value,
                predicate=has_it,
                has_side_effects=True,
            )

    store(list(groups), jnp.int32(column), row)
