"""Times at which a thread block came past a place, for a time line of a grid."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import interpreting
from pallas_kernels.mosaic.lane_code import one_lane

BEGIN, WAITED, END, CORE = range(4)


def stamps_type(num_blocks: int) -> jax.ShapeDtypeStruct:
    """[num_blocks, 4] int32: BEGIN, WAITED, END and CORE of each block.

    Times are the lower 32 bits of nanoseconds: as it began, after its last wait, and as it ended.
    They are not written where interpreted, nor WAITED by a block that does not wait.
    """
    return jax.ShapeDtypeStruct((num_blocks, 4), jnp.int32)


def stamp(stamps: Any, block_id: Any, place: int) -> None:
    """Writes the time, or for CORE the core, to stamps[block_id, place]; nothing for None."""
    if interpreting() or stamps is None:
        return
    register = "%smid" if place == CORE else "%globaltimer_lo"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def store(_, stamps, block_id):
        with one_lane():
            mgpu.utils.inline_ptx(
                f"""{{
                .reg .b64 at;
                .reg .b32 now;
                mad.wide.s32 at, $1, 16, $0;
                mov.u32 now, {register};
                st.global.u32 [at+{4 * place}], now;
                }}""",
                mgpu.utils.memref_ptr(stamps),
                block_id.registers.item(),
                has_side_effects=True,
            )

    store(stamps, jnp.int32(block_id))
