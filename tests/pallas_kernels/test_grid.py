"""The counters of grid.py, as XLA gets it, and what a barrier is lowered to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grid
from pallas_kernels.decode_experts import decode_experts
from tests.pallas_kernels.decode_experts.cases import Size, struct_case
from tests.pallas_kernels.machine import lower_for_cuda, mosaic_modules


def test_the_counter_starts_at_zero_and_is_like_no_other_constant():
    # XLA keeps constants of the same bytes once for all programs, and kernels write to this one.
    counter = np.asarray(grid.counters())
    assert counter.dtype == np.int32
    assert counter[0] == 0
    assert len(set(counter[1:].tolist())) > 8


@pytest.mark.parametrize("count", [1, 64])
def test_so_do_the_counters_of_tiles(count):
    counters = np.asarray(grid.tile_counters(count))
    assert counters.dtype == np.int32
    assert not counters[:count].any()
    assert len(set(counters[count:].tolist())) > 8


def test_a_program_holds_them_as_a_constant():
    size = Size(T=2, E=4, K=2, H=64, I=64)

    def layer(*arguments):
        return decode_experts(*arguments, layout="expert_major")

    words = ", ".join(map(str, np.asarray(grid.tile_counters(size.T * size.K)).tolist()))
    assert f"stablehlo.constant dense<[{words}]>" in lower_for_cuda(layer, *struct_case(size))


def lowered_barrier(num_programs: int) -> str:
    """The MLIR text of a kernel that waits, and then writes something."""

    def kernel(counter_gmem, out_gmem):
        program = lax.axis_index("program")
        grid.barrier(counter_gmem, num_programs, program)
        out_gmem[program] = jnp.int32(1)

    def function():
        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((num_programs,), jnp.int32),
            grid=(num_programs,),
            grid_names=("program",),
        )(grid.counters())

    [module] = mosaic_modules(lower_for_cuda(function))
    return module


@pytest.mark.parametrize(
    ("num_programs", "rest"), [(1, -(2**31)), (2, 2**31 - 1), (132, 2**31 - 131)]
)
def test_one_program_adds_what_is_left_of_2_to_the_31(num_programs, rest):
    # Modulo 2**32, as int32; every other program adds 1.
    assert f"value = {rest} : i32" in lowered_barrier(num_programs)


def test_every_lane_fences_its_stores_before_the_lanes_meet():
    module = lowered_barrier(2)
    assembly = re.findall(r'asm_string = "(.*?)", constraints', module)
    first = assembly.index("fence.proxy.async;")
    assert assembly[first + 1].startswith("bar.sync") and "atom.add" in assembly[first + 2]
    assert "scf.if" not in module[: module.index('"fence.proxy.async;"')]  # all lanes get there


def assembly_of(use) -> list[str]:
    """The inline assembly of a kernel that uses three counters, and then writes something."""

    def kernel(counters_gmem, out_gmem):
        use(counters_gmem, lax.axis_index("program"))
        out_gmem[0] = jnp.int32(1)

    def function():
        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
            grid=(3,),
            grid_names=("program",),
        )(grid.tile_counters(3))

    [module] = mosaic_modules(lower_for_cuda(function))
    return re.findall(r'asm_string = "(.*?)", constraints', module)


def test_who_counts_has_written_before():
    _, every_lane, meeting, one_lane = assembly_of(grid.count)
    assert every_lane == "fence.proxy.async;"
    assert meeting.startswith("bar.sync")
    # The release comes last: what it orders is written by then, by copies too.
    assert one_lane.index("fence.proxy.async") < one_lane.index("red.add.release.gpu")


def test_who_waits_copies_afterwards_and_the_last_one_resets():
    def use(counters, program):
        grid.wait_for_count(counters, program, 5, 4)

    _, one_lane, meeting, count = assembly_of(use)
    assert "waiting, now, 5;" in one_lane
    assert one_lane.index("ld.acquire.gpu") < one_lane.index("fence.proxy.async")
    assert meeting.startswith("bar.sync")
    # 5 have counted and 4 have waited: the last of these finds 8.
    assert "last, before, 8, counts;" in count and "@last st.relaxed" in count
