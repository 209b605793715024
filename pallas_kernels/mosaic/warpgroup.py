"""What the 128 lanes of a warpgroup do that Pallas has no operation for."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.device import interpreting
from pallas_kernels.mosaic.lane_code import VECTOR, constant, i32, lane_and_warp, words_of

LANES = 128  # of a warpgroup
_LANES_OF_WARP = 32

# [8, 64] in registers: 4 warps by 2 rows, 16 lanes by 4 elements along a row.
TILE_ROWS = 8
ROWS_BY_64 = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE_ROWS, 64), (2, 4))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)

# 64 elements, in each warp the same.
_ANY_MULTIPLE_OF_64 = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,),
    vector_dim=-1,
)


def row_layout(length: int) -> Any:
    """A row of a multiple of 64 bf16 in registers: 16-byte loads where the length allows.

    It sets the order of a sum over the row.
    """
    for elements_per_lane in (8, 4, 2):
        if length % (LANES * elements_per_lane) == 0:
            return plgpu.Layout.WG_STRIDED((length,), elements_per_lane)
    return _ANY_MULTIPLE_OF_64


def one_per_lane(length: int) -> Any:
    """The layout of a vector whose element i is in lane i % 128."""
    return plgpu.Layout.WG_STRIDED((length,), 1)


def lane_indices(length: int) -> jax.Array:
    """[length]: each element's index, in the layout one_per_lane."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=one_per_lane(length))


def where(condition: Any, x: jax.Array, otherwise: float) -> jax.Array:
    """jnp.where of a scalar condition, which Mosaic's select does not broadcast."""
    return jnp.where(lax.broadcast_in_dim(condition, x.shape, ()), x, otherwise)


def store_row(smem: Any, smem_row, gmem: Any, gmem_row) -> None:
    """Starts to copy a row of shared memory to a row of global memory.

    What lanes have stored in `smem` must be committed; plgpu.wait_smem_to_gmem waits for the end.
    """
    plgpu.copy_smem_to_gmem(smem.at[pl.ds(smem_row, 1)], gmem.at[pl.ds(gmem_row, 1)])


def sync_lanes(loaded: Sequence[jax.Array] = ()) -> None:
    """Waits until all lanes are here; what each stored in shared memory, all may read.

    What they have read, copies that start later may overwrite. The interpreter knows plgpu's own
    barrier only, which has the copy engine see the lanes' stores as well.

    Args:
      loaded: arrays of lane_code.registers_type. Lanes are here once these are in registers, where
        a barrier alone would let them go on while their loads still wait for the shared memory.
    """
    if interpreting():
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu(
        arg_types=([plgpu.Layout.WG_STRIDED(words.shape, VECTOR) for words in loaded],)
    )
    def sync(_, loaded):
        firsts = [words_of(vector_)[0] for words in loaded for vector_ in words.registers.flat]
        if not firsts:
            mgpu.warpgroup_barrier()
            return
        # The barrier takes a predicate of all vectors; what comes of it does not matter. A fence
        # of the copy engine's stores would be six instructions more, and wait for the same loads.
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred mine, any;
            setp.eq.b32 mine, $0, 0;
            bar.red.or.pred any, $1, {LANES}, mine;
            }}""",
            functools.reduce(arith.xori, firsts),
            mgpu.utils.warpgroup_barrier_idx(sync=False),
            has_side_effects=True,
            convergent=True,
        )

    sync(list(loaded))


def load_few(gmem: Any, smem: Any) -> None:
    """Copies a few words, where the copy engine wants multiples of 16 bytes.

    Other lanes may read what a lane has copied once all of them are past sync_lanes.

    Args:
      gmem: [n] of 4-byte words.
      smem: at least n.
    """
    start_few(gmem, smem)
    wait_for_few()


def start_few(gmem: Any, smem: Any) -> None:
    """load_few whose copies end before wait_for_few does; no lane waits for its words."""
    (length,) = gmem.shape
    if interpreting():
        smem[:length] = gmem[...]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def start(_, gmem, smem):
        for first in range(0, length, LANES):
            mgpu.utils.inline_ptx(
                f"""{{
                .reg .b64 from;
                .reg .b32 lane, to;
                .reg .pred there;
                mov.u32 lane, %tid.x;
                setp.lt.u32 there, lane, {length - first};
                mad.wide.u32 from, lane, 4, $0;
                mad.lo.u32 to, lane, 4, $1;
                @there cp.async.ca.shared.global [to+{4 * first}], [from+{4 * first}], 4;
                }}""",
                mgpu.utils.memref_ptr(gmem),
                mgpu.utils.memref_ptr(smem),
                has_side_effects=True,
            )

    start(gmem, smem)


def wait_for_few() -> None:
    """Waits until this lane's copies of start_few have ended."""
    if interpreting():
        return

    @plgpu.inline_mgpu()
    def wait(_):
        mgpu.utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)

    wait()


def scatter(values: jax.Array, places: jax.Array, length: int, smem: Any) -> None:
    """smem[places[i]] = values[i] for each i whose place is below `length`; all lanes may read it.

    Args:
      values: int32 or float32, a multiple of 128, in the layout one_per_lane.
      places: int32, likewise; not negative, and no two that count are equal.
      length: of what counts.
      smem: at least `length` elements.
    """
    if interpreting():
        order = lax.broadcasted_iota(jnp.int32, (length, places.shape[0]), 0)
        smem[:length] = jnp.sum(jnp.where(places == order, values, 0), axis=1, dtype=values.dtype)
        return
    layout = one_per_lane(values.shape[0])
    kind = "f32" if values.dtype == jnp.float32 else "b32"

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType()))
    def store(_, values, places, smem):
        pointer = mgpu.utils.memref_ptr(smem)
        for value, place in zip(values.registers.flat, places.registers.flat, strict=True):
            mgpu.utils.inline_ptx(
                f"""{{
                .reg .pred counts;
                .reg .b32 at;
                setp.lt.u32 counts, $1, {length};
                mad.lo.s32 at, $1, 4, $2;
                @counts st.shared.{kind} [at], $0;
                }}""",
                _element(value),
                _element(place),
                pointer,
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()

    store(values, places, smem)


def _element(register):
    """The only element of a vector of one."""
    return vector.extract(
        register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
    )


def add_histogram(ids: Any, length: int, E: int, counts: Any) -> None:
    """Adds to counts[e] how many of the first `length` ids are e, for each e in [0, E).

    One addition in shared memory an id. In Pallas alone a lane could only compare every id with its
    own expert, E times as many operations (docs/lab.md says what that cost). The interpreter has no
    such instruction, and compares. Other ids are padding.

    Args:
      ids: int32 in shared memory, which all lanes may read.
      length: how many there are.
      E: how many different ids count.
      counts: int32 in shared memory, at least E; all lanes may read it afterwards.
    """
    if interpreting():
        experts = lax.broadcasted_iota(jnp.int32, (E, length), 0)
        counts[:E] += jnp.sum(ids[:length] == experts, axis=1, dtype=jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def add(_, ids, counts):
        pointers = map(mgpu.utils.memref_ptr, (ids, counts))
        mgpu.utils.inline_ptx(_histogram_ptx(length, E), *pointers, has_side_effects=True)
        mgpu.warpgroup_barrier()

    add(ids, counts)


def _histogram_ptx(length: int, E: int) -> str:
    """All loads come first, because none of them would be moved up over an addition."""
    rounds = range(-(-length // LANES))
    load = "\n".join(
        f"""
        setp.lt.u32 there{i}, lane, {length - i * LANES};
        @there{i} ld.shared.u32 id{i}, [from+{4 * i * LANES}];"""
        for i in rounds
    )
    add = "\n".join(
        f"""
        setp.lt.and.u32 there{i}, id{i}, {E}, there{i};
        mad.lo.s32 to, id{i}, 4, $1;
        @there{i} red.shared.add.u32 [to], 1;"""
        for i in rounds
    )
    return f"""{{
        .reg .b32 lane, from, to, id<{len(rounds)}>;
        .reg .pred there<{len(rounds)}>;
        mov.u32 lane, %tid.x;
        mad.lo.s32 from, lane, 4, $0;
        {load}
        {add}
        }}"""


def add_products(total: jax.Array, factors: Sequence[tuple[Any, Any]]) -> jax.Array:
    """Total + a @ b of each pair in turn, on the tensor cores; none runs on afterwards.

    The interpreter has no accumulator that starts with values.

    Args:
      total: [a multiple of 64, N] float32 in Layout.WGMMA.
      factors: of bf16 in shared memory, as wgmma takes them.
    """

    def multiply(acc):
        for a, b in factors:
            plgpu.wgmma(acc, a, b)
        plgpu.wgmma_wait(0)

    if not interpreting():
        return pl.run_state(multiply)(plgpu.ACC.init(total))

    def multiply_and_load(acc):
        multiply(acc)
        return acc[...]

    return total + pl.run_scoped(multiply_and_load, plgpu.ACC(total.shape, total.dtype))


def equal_bits(words: Any, length: int, value: jax.Array) -> list[jax.Array]:
    """Which words are equal to a value, as bits: bit i % 32 of int32 i // 32 is that of words[i].

    A lane compares one of each 32, where Pallas alone would have each lane compare all.

    Args:
      words: int32 in global or shared memory.
      length: how many of them count.
      value: int32.
    """
    firsts = range(0, length, _LANES_OF_WARP)
    if interpreting():
        equal = [words[i] == value for i in range(length)]
        parts = [equal[first : first + _LANES_OF_WARP] for first in firsts]
        shifted = [
            [jnp.where(bit, lax.shift_left(jnp.int32(1), i), 0) for i, bit in enumerate(part)]
            for part in parts
        ]
        return [functools.reduce(operator.or_, part) for part in shifted]
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=[scalar] * len(firsts)
    )
    def compare(_, words, value):
        space = "shared" if mgpu.utils.is_smem_ref(words) else "global"
        lane, _ = lane_and_warp()
        pointer, value = mgpu.utils.memref_ptr(words), value.registers.item()
        loaded = []
        for first in firsts:
            place = arith.minui(lane, constant(min(_LANES_OF_WARP, length - first) - 1))
            at = mgpu.utils.getelementptr(pointer, [place], i32())
            ptx = f"ld.{space}.b32 $0, [$1+{4 * first}];"
            loaded.append(mgpu.utils.inline_ptx(ptx, at, result_types=i32(), has_side_effects=True))
        return [
            mgpu.FragmentedArray.splat(
                mgpu.utils.inline_ptx(
                    f"""{{
                    .reg .pred same;
                    setp.eq.b32 same, $1, $2;
                    setp.lt.and.u32 same, $3, {length - first}, same;
                    vote.sync.ballot.b32 $0, same, 0xffffffff;
                    }}""",
                    word,
                    value,
                    lane,
                    result_types=i32(),
                    convergent=True,
                ),
                (),
                is_signed=True,
            )
            for first, word in zip(firsts, loaded, strict=True)
        ]

    return list(compare(words, value))
