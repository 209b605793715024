"""Pieces of code for each lane by itself, for kernels' own primitives: addresses, loads, integers.

All take and return MLIR values, inside plgpu.inline_mgpu.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


@contextlib.contextmanager
def one_lane() -> Iterator[None]:
    """What is built inside is done by one lane of the warpgroup.

    mgpu.single_thread does the same, but a global of the process tells it whether it is inside of
    another one. While one thread lowers such code, what other threads lower is done by all lanes:
    a block then signals 128 times, and those who wait read before anything is written.
    """
    one = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARPGROUP)
    with mgpu.utils.when(one):
        yield


def lane_and_warp() -> tuple:
    """The lane of its warp, 0 to 31, and the warp of the warpgroup, 0 to 3."""
    thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
    return bits_and(thread, 31), shift_right(thread, 5)


def load_shared(at, offset: int, words: int, kind: str = "b32") -> tuple:
    """2 or 4 words of shared memory."""
    names = ", ".join(f"${i}" for i in range(words))
    type_ = ir.F32Type.get() if kind == "f32" else i32()
    return mgpu.utils.inline_ptx(
        f"ld.shared.v{words}.{kind} {{{names}}}, [${words}+{offset}];",
        at,
        result_types=[type_] * words,
        has_side_effects=True,
    )


def shared_pointer(smem):
    """The 32-bit address of shared memory."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(smem))


def i32():
    """The type of an integer, and of any 4 bytes."""
    return ir.IntegerType.get_signless(32)


def constant(value: int):
    """An i32."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value))


def bits_and(value, mask: int):
    """Those bits of `value` that are in `mask`."""
    return arith.andi(value, constant(mask))


def shift_left(value, bits: int):
    """Value * 2^bits."""
    return arith.shli(value, constant(bits))


def shift_right(value, bits: int):
    """Value // 2^bits of a number that is not negative."""
    return arith.shrui(value, constant(bits))


def global_pointer(gmem):
    """The 64-bit address of global memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(gmem))


def widened(value):
    """A number that is not negative, as an i64."""
    return arith.extui(ir.IntegerType.get_signless(64), value)


def load_global(at, offset: int, words: int, there) -> tuple:
    """2 or 4 words of global memory, as other blocks have left them; any, if `there` is 0."""
    names = ", ".join(f"${i}" for i in range(words))
    return mgpu.utils.inline_ptx(
        f"""{{
        .reg .pred there;
        setp.ne.b32 there, ${words + 1}, 0;
        @there ld.relaxed.gpu.global.v{words}.b32 {{{names}}}, [${words}+{offset}];
        }}""",
        at,
        there,
        result_types=[i32()] * words,
        has_side_effects=True,
    )


_LANES = 128
VECTOR = 4  # words of the widest load


def registers_type(count: int, words: int) -> Any:
    """An array of `count` vectors of 2 or 4 words a lane: what lanes hand on, in no other order."""
    shape = (count * words * _LANES,)
    return plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=plgpu.Layout.WG_STRIDED(shape, words))


def as_array(vectors: list[tuple]) -> Any:
    """The array of registers_type, of a lane's own vectors."""
    words = len(vectors[0])
    type_ = ir.VectorType.get((words,), i32())
    registers = np.empty(len(vectors), dtype=object)
    for index, vector_ in enumerate(vectors):
        registers[index] = vector.from_elements(type_, vector_)
    shape = (len(vectors) * words * _LANES,)
    return mgpu.FragmentedArray(
        _registers=registers,
        _layout=plgpu.Layout.WG_STRIDED(shape, words).to_mgpu(),
        _is_signed=True,
    )


def words_of(register) -> list:
    """The words of one vector."""
    return [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]
