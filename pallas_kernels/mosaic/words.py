"""The 32-bit words of an array in registers: their places in global memory, loads and stores.

    places_of      what each lane holds of an array of some layout
    load_words     all of several arrays in one piece of PTX, again and again until none is empty
    store_words    an array's words, or empty ones
    assemble       an array from its words
    fill_words     a block's part of filling an array with empty words

Loads and stores are relaxed ones of the whole GPU: they go past a core's own cache.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.mosaic.grid_sync import TIMEOUT_VARIABLE
from pallas_kernels.mosaic.warpgroup import LANES

EMPTY = 0xFFFFFFFF  # a NaN that no arithmetic makes
_LARGEST_VECTOR = 4  # words of one load


class Place(NamedTuple):
    """Words side by side that one lane holds: a pointer, how many, and whether they are there."""

    pointer: ir.Value
    count: int
    there: ir.Value | None


def places_of(ref, shape, layout, limit, transposed: bool = False) -> list[Place]:
    """What a lane holds of an array, register by register."""
    if isinstance(layout, mgpu.WGSplatFragLayout):
        return [Place(mgpu.utils.memref_ptr(ref), 1, None)]
    strided = isinstance(layout, mgpu.WGStridedFragLayout)
    length = layout.vec_size if strided else layout.vector_length
    at_once = 1 if transposed else min(length, _LARGEST_VECTOR)
    index = ir.IndexType.get()
    places = []
    for first in layout.thread_idxs(shape):
        for ahead in range(0, length, at_once):
            *others, last = first
            at = (*others, arith.addi(last, mgpu.utils.c(ahead, index)))
            at = at[::-1] if transposed else at
            there = None
            if limit is not None:
                bound = arith.index_cast(index, limit.registers.item())
                there = arith.cmpi(arith.CmpIPredicate.slt, at[0], bound)
                there = arith.extui(ir.IntegerType.get_signless(32), there)
                # A place that is not there may be beyond the array.
            pointer = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(ref, at))
            places.append(Place(pointer, at_once, there))
    return places


def load_words(arrays: list[list[Place]], polled: Sequence[bool]) -> list[list[ir.Value]]:
    """The words, int32, of each array; one piece of PTX, so that all loads come before any use."""
    i32 = ir.IntegerType.get_signless(32)
    places = [place for array in arrays for place in array]
    num_words = sum(place.count for place in places)
    operands, setup, loads, polled_words, word = [], [], [], [], 0
    for array, polls in zip(arrays, polled, strict=True):
        for place in array:
            names = [f"${word + ahead}" for ahead in range(place.count)]
            if polls:
                polled_words += names
            guard = ""
            if place.there is not None:
                guard = f"@there{word} "
                setup.append(f".reg .pred there{word};")
                setup.append(f"setp.ne.b32 there{word}, ${num_words + len(operands)}, 0;")
                setup += [f"mov.b32 {name}, 0;" for name in names]
                operands.append(place.there)
            vector_kind = f".v{place.count}" if place.count > 1 else ""
            group = f"{{{', '.join(names)}}}" if place.count > 1 else names[0]
            loads.append(
                f"{guard}ld.relaxed.gpu.global{vector_kind}.b32 {group}, "
                f"[${num_words + len(operands)}];"
            )
            operands.append(place.pointer)
            word += place.count
    lines = [*setup, *loads]
    if polled_words:
        lines = [*setup, *_again_until_full(loads, polled_words)]
    found = mgpu.utils.inline_ptx(
        "\n".join(["{", *lines, "}"]),
        *operands,
        result_types=[i32] * num_words,
        has_side_effects=True,
    )
    found = iter(found)
    return [[next(found) for place in array for _ in range(place.count)] for array in arrays]


def _again_until_full(loads: list[str], words: list[str]) -> list[str]:
    """PTX that loads again while one of the words is empty: while the largest one is."""
    lines, level, number = [".reg .pred missing;", "again:", *loads], list(words), 0
    while len(level) > 1:
        pairs, level = [level[i : i + 2] for i in range(0, len(level), 2)], []
        for pair in pairs:
            if len(pair) == 2:
                name, number = f"largest{number}", number + 1
                lines += [f".reg .b32 {name};", f"max.u32 {name}, {pair[0]}, {pair[1]};"]
                level.append(name)
            else:
                level += pair
    timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, 0))
    test = [f"setp.eq.u32 missing, {level[0]}, {EMPTY:#x};", "@missing bra again;"]
    if timeout_s:
        start = [".reg .b64 start, time;", ".reg .pred late;", "mov.u64 start, %globaltimer;"]
        look = [
            "mov.u64 time, %globaltimer;",
            "sub.u64 time, time, start;",
            f"setp.gt.u64 late, time, {int(timeout_s * 1e9)};",
            f"setp.eq.and.u32 late, {level[0]}, {EMPTY:#x}, late;",
            "@late trap;",
        ]
        return [*start, *lines, *look, *test]
    return [*lines, *test]


def assemble(words: list[ir.Value], shape, layout) -> mgpu.FragmentedArray:
    """A float32 array of what `_load` returned for it."""
    f32 = ir.F32Type.get()
    elements = [arith.bitcast(f32, word) for word in words]
    if isinstance(layout, mgpu.WGSplatFragLayout):
        return mgpu.FragmentedArray.splat(elements[0], shape, layout)
    kind = layout.registers_element_type(f32)
    length = kind.shape[0]
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for number, at in enumerate(np.ndindex(registers.shape)):
        part = elements[number * length : (number + 1) * length]
        registers[at] = vector.from_elements(kind, part)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def store_words(places: list[Place], value: mgpu.FragmentedArray | None) -> None:
    """Stores a value's words, or empty ones."""
    i32 = ir.IntegerType.get_signless(32)
    words = None if value is None else iter(_words(value))
    for place in places:
        if words is None:
            given = [mgpu.utils.c(EMPTY - 2**32, i32)] * place.count
        else:
            given = [next(words) for _ in range(place.count)]
        names = [f"${number}" for number in range(place.count)]
        vector_kind = f".v{place.count}" if place.count > 1 else ""
        group = f"{{{', '.join(names)}}}" if place.count > 1 else names[0]
        setup, guard, there = "", "", []
        if place.there is not None:
            there = [place.there]
            setup = f".reg .pred there;\nsetp.ne.b32 there, ${place.count + 1}, 0;"
            guard = "@there "
        mgpu.utils.inline_ptx(
            f"{{\n{setup}\n{guard}st.relaxed.gpu.global{vector_kind}.b32 "
            f"[${place.count}], {group};\n}}",
            *given,
            place.pointer,
            *there,
            has_side_effects=True,
        )


def _words(value: mgpu.FragmentedArray) -> list[ir.Value]:
    """Each element's bits; an empty word would be a NaN, and becomes another one."""
    i32 = ir.IntegerType.get_signless(32)
    found = []
    for register in value.registers.flat:
        kind = ir.VectorType(register.type)
        for number in range(kind.shape[0]):
            element = vector.extract(
                register,
                dynamic_position=[],
                static_position=ir.DenseI64ArrayAttr.get([number]),
            )
            word = arith.bitcast(i32, element)
            found.append(arith.minui(word, mgpu.utils.c(EMPTY - 1 - 2**32, i32)))
    return found


def fill_words(ref, block_id: ir.Value, num_blocks: int) -> None:
    """Lanes of all blocks take turns; by four words where the array has a multiple of four."""
    count = math.prod(ir.MemRefType(ref.type).shape)
    length = _LARGEST_VECTOR if count % _LARGEST_VECTOR == 0 else 1
    kind, group = ("", "empty") if length == 1 else (".v4", "{empty, empty, empty, empty}")
    mgpu.utils.inline_ptx(
        f"""{{
        .reg .pred more;
        .reg .b32 at, lane, empty;
        .reg .b64 place;
        mov.b32 empty, {EMPTY:#x};
        mov.u32 lane, %tid.x;
        mad.lo.s32 at, $1, {LANES}, lane;
        again:
        setp.lt.u32 more, at, {count // length};
        @!more bra done;
        mad.wide.u32 place, at, {4 * length}, $0;
        st.global{kind}.b32 [place], {group};
        add.u32 at, at, {LANES * num_blocks};
        bra again;
        done:
        }}""",
        mgpu.utils.memref_ptr(ref),
        block_id,
        has_side_effects=True,
    )
