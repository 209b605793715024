import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from tests.pallas_kernels.machine import INTERPRET, lower_for_cuda, mosaic_modules


def _through_shared_memory(copies, x, interpret=False):
    """x, each row brought by one of the copies."""

    def kernel(block_id, x_gmem, y_gmem, smem, barrier):
        for row, copy in enumerate(copies):
            copy(x_gmem.at[row], smem.at[row], barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(smem, y_gmem)
        plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel,
        name="through_shared_memory",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_arrivals=len(copies))],
        interpret=interpret,
    )(x)


def test_values_arrive():
    x = jnp.arange(256, dtype=jnp.float32).reshape(2, 128)
    y = _through_shared_memory([copy_evict_first, plgpu.copy_gmem_to_smem], x, INTERPRET)
    assert jnp.array_equal(x, y)


@pytest.mark.parametrize("hinted", [[False], [True], [False, True], [True, False, True]])
def test_a_copy_has_its_own_hint_or_none(hinted):
    copies = [copy_evict_first if hint else plgpu.copy_gmem_to_smem for hint in hinted]
    x = jax.ShapeDtypeStruct((len(copies), 128), jnp.float32)
    lowered = lower_for_cuda(lambda x: _through_shared_memory(copies, x), x)
    [module] = mosaic_modules(lowered)
    lines = module.splitlines()
    loads = [line for line in lines if "cp.async.bulk.tensor.shared" in line]
    assert len(loads) == len(copies)
    made = [line for line in lines if "createpolicy" in line]
    assert len(made) == sum(hinted) and all("L2::evict_first" in line for line in made)
    # Each is the operand of one copy, in the same order.
    names = [line.split("=")[0].strip() for line in made]
    used = [[name for name in names if f"{name}," in load] for load in loads]
    assert [len(of_load) == 1 for of_load in used] == hinted
    assert [name for of_load in used for name in of_load] == names


def test_a_copy_by_one_lane_has_no_barrier_and_one_arrival():
    def lowered(by_one_lane):
        copy = functools.partial(copy_evict_first, by_one_lane=by_one_lane)
        x = jax.ShapeDtypeStruct((1, 128), jnp.float32)
        [module] = mosaic_modules(lower_for_cuda(lambda x: _through_shared_memory([copy], x), x))
        return [
            module.count(found) for found in ("bar.sync", "cp.async.bulk.tensor.shared")
        ], module

    (barriers, copies), module = lowered(False)
    (fewer_barriers, same_copies), by_one_lane = lowered(True)
    assert (fewer_barriers, same_copies) == (barriers - 1, copies)
    arrival = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0], 128"
    assert [text.count(arrival) for text in (module, by_one_lane)] == [0, 1]
