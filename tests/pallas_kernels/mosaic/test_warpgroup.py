import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.warpgroup import add_histogram
from tests.pallas_kernels.machine import INTERPRET


# A multiple of the lanes and not; more experts than lanes; an array of ids with a tail.
@pytest.mark.parametrize("length, E", [(1, 2), (128, 128), (130, 5), (1000, 300)])
def test_counts_what_was_there_and_the_ids_in_range(length, E, seed):
    rng = np.random.default_rng(seed)
    size, experts = (-(-most // 128) * 128 for most in (length, E))
    ids = rng.integers(-3, E + 3, size).astype(np.int32)
    ids[: length // 2] = rng.integers(E)  # a popular one, many times in each warp
    ids[length:] = 0  # not to be counted
    before = rng.integers(0, 9, experts).astype(np.int32)

    def kernel(block_id, ids_gmem, before_gmem, after_gmem, ids_smem, counts, full):
        for gmem, smem in ((ids_gmem, ids_smem), (before_gmem, counts)):
            for start in range(0, smem.shape[0], 128):
                part = pl.ds(start, 128)
                plgpu.copy_gmem_to_smem(gmem.at[part], smem.at[part], full)
        plgpu.barrier_wait(full)
        add_histogram(ids_smem, length, E, counts)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(counts, after_gmem)
        plgpu.wait_smem_to_gmem(0)

    count = launch(
        kernel,
        name="count",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((experts,), jnp.int32),
        scratch_types=[
            plgpu.SMEM((size,), jnp.int32),
            plgpu.SMEM((experts,), jnp.int32),
            plgpu.Barrier(num_arrivals=(size + experts) // 128),
        ],
        interpret=INTERPRET,
    )
    expected = before.copy()
    for expert in range(E):
        expected[expert] += np.sum(ids[:length] == expert)
    np.testing.assert_array_equal(count(jnp.asarray(ids), jnp.asarray(before)), expected)
