"""Programs that share a core and begin together, set apart in time.

Two programs share a core so that one reads while the other stores its results, ends, and makes room
for the next one, some 3 us in which it reads nothing. But all of the first ones begin at the same
time and take equally long, so that they end at the same time, too, and nobody reads:

    program 0    reads......  stores  reads (program 264) ...
    program 132  reads......  stores  reads ...

    program 0    reads...  stores  reads ...
    program 132       reads......  stores  reads ...

So those that come second to a core begin later, by half of the time that the first needs alone.
Later ones begin whenever one has ended, and their times spread by themselves.
"""

import functools

from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import core_count

# What a core gets of 3.2 TB/s, an H100's. Measured, 0.4 to 0.8 of a program's time are as good as
# half of it, so it need not be exact for other GPUs.
_BYTES_A_NS = 24
# With fewer, the late ones would end last.
_LEAST_PROGRAMS_A_CORE = 4


def begin_apart(program, num_programs: int, bytes_read: int) -> None:
    """Lets this program wait if it is the second of its core; not for interpret mode.

    Args:
      program: its number; a core takes programs in the order of their numbers, one, then another.
      num_programs: of the grid, or of its first part whose programs are alike; also those that will
        find nothing to do, for how many these are is not known before.
      bytes_read: by each program.
    """
    cores = core_count()
    if num_programs < _LEAST_PROGRAMS_A_CORE * cores:
        return
    second = (program >= cores) & (program < 2 * cores)
    pl.when(second)(functools.partial(_wait, bytes_read // _BYTES_A_NS // 2))


def _wait(ns: int) -> None:
    @plgpu.inline_mgpu()
    def wait(_):
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            mgpu.utils.inline_ptx(
                f"""{{
                .reg .b64 start, now;
                .reg .pred waiting;
                mov.u64 start, %globaltimer;
                again:
                nanosleep.u32 100;
                mov.u64 now, %globaltimer;
                sub.u64 now, now, start;
                setp.lt.u64 waiting, now, {ns};
                @waiting bra again;
                }}""",
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()

    wait()
