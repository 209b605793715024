"""How thread blocks of one grid wait for each other, through counters in global memory.

    signal             this block has written its part
    wait               until that number of blocks has signalled
    pause              some nanoseconds
    staggered_start    the second block of each core begins later

A block waits for lower-numbered blocks only. A core takes blocks in the order of their numbers, as
GPUs do and CUDA does not promise, so a block that is waited for is at work or done. The interpreter
runs blocks one after the other in that order: there `wait` checks that the signals have come.

Each launch leaves the counters as it found them. No other grid may use them at the same time: XLA's
kernels follow one another, in a CUDA graph too, unless it is told otherwise by
--xla_gpu_command_buffer_scheduling_mode=CONCURRENT.

With PALLAS_KERNELS_SPIN_TIMEOUT_S=5 in the environment, a block that has waited for 5 s prints
which counter it waits for and how many signals have come, and traps.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic.device import core_count, interpreting
from pallas_kernels.mosaic.lane_code import one_lane

TIMEOUT_VARIABLE = "PALLAS_KERNELS_SPIN_TIMEOUT_S"

# XLA keeps one copy on the device of all constants that have the same bytes, in whichever program
# they stand (its flag xla_gpu_enable_shared_constants). Counters of zeros alone would be every
# program's zeros of that size, and change under their eyes. These words make them unlike any other.
_UNLIKE_OTHER_CONSTANTS = np.array([*b"counters of pallas_kernels"], np.int32)


def zeroed_counters(count: int) -> jax.Array:
    """[count + some] int32: counters for `signal` and `wait`, a constant of the program.

    XLA sets them up as the program is loaded, and each launch leaves them at zero. Fresh zeros
    would be one more kernel, or a copy, in each call. All calls on one device with as many share
    them.
    """
    return jnp.asarray(np.concatenate([np.zeros(count, np.int32), _UNLIKE_OTHER_CONSTANTS]))


def signal(counters: Any, index: Any) -> None:
    """Adds one to counters[index], after all that this block's lanes have written and waited for.

    What the copy engine has written is not ordered before it. What lanes have written a copy may
    read: `wait` has a fence for the copies that follow.

    Args:
      counters: int32 in global memory, see zeroed_counters.
      index: int32.
    """
    if interpreting():
        counters[index] = counters[index] + 1
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def add_one(_, counters, index):
        mgpu.warpgroup_barrier()
        with one_lane():
            mgpu.utils.inline_ptx(
                """{
                .reg .b64 at;
                mad.wide.s32 at, $1, 4, $0;
                red.add.release.gpu.global.u32 [at], 1;
                }""",
                mgpu.utils.memref_ptr(counters),
                index.registers.item(),
                has_side_effects=True,
            )

    add_one(counters, jnp.int32(index))


def wait(counters: Any, index: Any, expected: int, num_waiting: int) -> None:
    """Waits until counters[index] is `expected`; all that the signallers wrote can be read then.

    Each block that has waited adds one, too, and the last of them sets the counter back to zero for
    the next launch.

    Args:
      counters: int32 in global memory, see zeroed_counters.
      index: int32.
      expected: blocks that signal.
      num_waiting: blocks that wait.

    Raises:
      RuntimeError: interpreted, fewer signals have come: blocks ran in another order than that of
        their numbers, or one waits for a later one.
    """
    if interpreting():
        jax.debug.callback(_check_signals, counters[index], index, expected)
        return
    timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, 0))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def spin(_, counters, index):
        pointer, index = mgpu.utils.memref_ptr(counters), index.registers.item()
        with one_lane():
            if timeout_s:
                _spin_or_trap(pointer, index, expected, timeout_s)
            else:
                _spin(pointer, index, expected)
        mgpu.warpgroup_barrier()
        # A lane that has nothing else to do, for the answer takes its time.
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .b64 at;
            .reg .b32 lane, before;
            .reg .pred counts, last;
            mov.u32 lane, %tid.x;
            setp.eq.u32 counts, lane, 127;
            mad.wide.s32 at, $1, 4, $0;
            mov.u32 before, 0;
            @counts atom.add.relaxed.gpu.global.u32 before, [at], 1;
            setp.eq.and.u32 last, before, {expected + num_waiting - 1}, counts;
            @last st.relaxed.gpu.global.u32 [at], 0;
            }}""",
            pointer,
            index,
            has_side_effects=True,
        )

    spin(counters, jnp.int32(index))


def _check_signals(found, index, expected) -> None:
    if found < expected:
        raise RuntimeError(
            f"a thread block waits for counter {index}, where {found} of {expected} blocks have "
            "signalled; expected all of them, because they have lower numbers"
        )


def _spin(pointer, index, expected: int) -> None:
    mgpu.utils.inline_ptx(
        f"""{{
        .reg .b64 at;
        .reg .b32 now;
        .reg .pred waiting;
        mad.wide.s32 at, $1, 4, $0;
        again:
        ld.acquire.gpu.global.u32 now, [at];
        setp.lt.u32 waiting, now, {expected};
        @waiting bra again;
        fence.proxy.async;
        }}""",
        pointer,
        index,
        has_side_effects=True,
    )


def _spin_or_trap(pointer, index, expected: int, timeout_s: float) -> None:
    """_spin that ends after timeout_s with a message and a trap; it costs a clock read a round."""
    now = mgpu.utils.inline_ptx(
        f"""{{
        .reg .b64 at, start, time;
        .reg .pred waiting;
        mad.wide.s32 at, $2, 4, $1;
        mov.u64 start, %globaltimer;
        again:
        ld.acquire.gpu.global.u32 $0, [at];
        mov.u64 time, %globaltimer;
        sub.u64 time, time, start;
        setp.lt.u64 waiting, time, {int(timeout_s * 1e9)};
        setp.lt.and.u32 waiting, $0, {expected}, waiting;
        @waiting bra again;
        fence.proxy.async;
        }}""",
        pointer,
        index,
        result_types=ir.IntegerType.get_signless(32),
        has_side_effects=True,
    )
    limit = mgpu.utils.c(expected, now.type)
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, now, limit)):
        mgpu.utils.debug_print(
            f"thread block {{}} waited {timeout_s} s for counter {{}}: {{}} of {expected} signals",
            mgpu.utils.block_idx(),
            index,
            now,
            uniform=False,
        )
        mgpu.utils.inline_ptx("trap;", has_side_effects=True)


# What a core gets of 3.2 TB/s, an H100's. Measured, 0.4 to 0.8 of a block's time are as good as
# half of it, so it need not be exact for other GPUs.
_BYTES_PER_NS = 24
# Of a core's clock, about. It is read in place of %globaltimer, which all cores share.
_CYCLES_PER_US = 1800
# With fewer, the late ones would end last.
_MIN_BLOCKS_PER_CORE = 4


def staggered_start(block_id: Any, num_blocks: int, bytes_read: int) -> None:
    """Lets this block wait if it is the second of its core, by half of a block's time.

    Two blocks share a core so that one reads while the other stores its results, ends, and makes
    room for the next one: some 3 us in which it reads nothing. But the first blocks of all cores
    begin at the same time and take equally long. So they end at the same time, and no block reads:

        block 0      reads......  stores  reads (block 264) ...
        block 132    reads......  stores  reads ...

        block 0      reads...  stores  reads ...
        block 132         reads......  stores  reads ...

    Later blocks begin whenever one has ended, and their times spread by themselves. The interpreter
    has no clock to wait by, and starts at once.

    Args:
      block_id: int32; a core takes blocks in the order of their numbers, one, then another.
      num_blocks: of the grid, or of its first part whose blocks are alike. Blocks that will find
        nothing to do count, because how many these are is not known before.
      bytes_read: by each block.
    """
    cores = core_count()
    if interpreting() or num_blocks < _MIN_BLOCKS_PER_CORE * cores:
        return
    second = (block_id >= cores) & (block_id < 2 * cores)
    pl.when(second)(functools.partial(pause, bytes_read // _BYTES_PER_NS // 2))


def pause(ns: Any) -> None:
    """Lets all lanes do nothing for some nanoseconds; the interpreter has no clock, and goes on.

    Args:
      ns: int32, at most a millisecond.
    """
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def sleep(_, ns):
        with one_lane():
            mgpu.utils.inline_ptx(
                f"""{{
                .reg .b32 start, now, cycles;
                .reg .pred waiting;
                mul.lo.s32 cycles, $0, {_CYCLES_PER_US};
                div.s32 cycles, cycles, 1000;
                mov.u32 start, %clock;
                again:
                mov.u32 now, %clock;
                sub.u32 now, now, start;
                setp.lt.u32 waiting, now, cycles;
                @waiting nanosleep.u32 50;
                @waiting bra again;
                }}""",
                ns.registers.item(),
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()

    sleep(jnp.int32(ns))
