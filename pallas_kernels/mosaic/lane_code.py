"""Pieces of code for each lane by itself, for kernels' own primitives: addresses, loads, integers.

All take and return MLIR values, inside plgpu.inline_mgpu.
"""

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


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
