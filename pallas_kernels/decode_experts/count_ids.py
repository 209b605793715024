"""How many tokens each expert has, from ids in shared memory: one addition an id.

In Pallas alone a lane could only compare every id with its own expert, E times as many operations
(results/designs/expert_major.md says what that cost). Shared memory can add for whichever lane has
the id.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # of a warpgroup


def count_ids(ids: Any, length: int, E: int, counts: Any, interpret: Any) -> None:
    """Adds to counts[e] how many of the first `length` ids are e, for each e in [0, E).

    Other ids are padding. For programs of one warpgroup.

    Args:
      ids: int32 in shared memory, which all lanes may read.
      length: how many there are.
      E: how many different ids count.
      counts: int32 in shared memory, at least E; all lanes may read it afterwards.
      interpret: as in decode_experts. The interpreter has no such instruction, and compares.
    """
    if interpret:
        experts = lax.broadcasted_iota(jnp.int32, (E, length), 0)
        counts[:E] += jnp.sum(ids[:length] == experts, axis=1, dtype=jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def add(_, ids, counts):
        pointers = map(mgpu.utils.memref_ptr, (ids, counts))
        mgpu.utils.inline_ptx(_ptx(length, E), *pointers, has_side_effects=True)
        mgpu.warpgroup_barrier()

    add(ids, counts)


def _ptx(length: int, E: int) -> str:
    """All loads first, for none of them would be moved up over an addition."""
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
