"""A barrier of the whole grid, until the router's phases wait for lower-numbered blocks alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def barrier(counter: Any, num_programs: int, program) -> None:
    """Waits until all programs of the grid are here; what they wrote before it, all can copy then.

    All of them must be on the device at once, or it never ends: at most one a core.

    The counter need not be zero: each barrier adds exactly 2**31 to it, modulo 2**32, whichever
    program comes last, and who waits looks at the top bit alone. So it is ready for the next
    barrier, and the next launch, without anyone setting it.

    Args:
      counter: int32 in global memory, whose first element is a multiple of 2**31 before the first
        barrier ever.
      num_programs: how many programs there are.
      program: this one's index.
    """
    # Modulo 2**32: a single program's 2**31 is no int32.
    rest = np.uint32(2**31 - (num_programs - 1)).astype(np.int32)
    share = jnp.where(program == 0, jnp.int32(rest), jnp.int32(1))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait_for_all(_, counter, share):
        # Of a lane's own stores: one lane's fence need not order the others' before a copy.
        mgpu.utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            mgpu.utils.inline_ptx(
                """{
                .reg .b32 before, now;
                .reg .pred waiting;
                fence.proxy.async;
                fence.acq_rel.gpu;
                atom.add.acq_rel.gpu.global.u32 before, [$0], $1;
                again:
                ld.acquire.gpu.global.u32 now, [$0];
                xor.b32 now, now, before;
                setp.ge.s32 waiting, now, 0;
                @waiting bra again;
                fence.acq_rel.gpu;
                fence.proxy.async;
                }""",
                mgpu.utils.memref_ptr(counter),
                share.registers.item(),
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()

    wait_for_all(counter, share)


# XLA keeps one copy on the device of all constants that have the same bytes, whichever programs
# they belong to (its flag xla_gpu_enable_shared_constants). A counter that was 0 and nothing else
# would be every program's zero of that size, and change under their eyes; the words after it have
# no meaning but to be unlike any other constant's.
_COUNTER = np.array([0, *b"counters of pallas_kernels"], np.int32)


def counters() -> jax.Array:
    """The barrier's counter, [0]; a constant of the program.

    XLA sets them up as the program is loaded, and each use leaves them ready for the next, so
    nobody needs to set them again: fresh zeros would be one more kernel, or a copy, in each call.
    All programs on one device share them.
    """
    return jnp.asarray(_COUNTER)
