import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.warpgroup import add_histogram, one_per_lane, scatter, where
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


# One value a lane and several; fewer places than values, and as many.
@pytest.mark.parametrize(("size", "length"), [(128, 8), (256, 200)])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_values_go_to_their_places(size, length, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 1000, size).astype(dtype)
    places = rng.permutation(size).astype(np.int32)

    def kernel(block_id, values, places, out, smem):
        layout = one_per_lane(size)
        loaded = [plgpu.load(ref, layout=layout) for ref in (values, places)]
        smem[...] = jnp.zeros(smem.shape, smem.dtype)
        scatter(*loaded, length, smem)
        out[...] = plgpu.load(smem, layout=layout)

    run = launch(
        kernel,
        name="scatter",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((size,), dtype),
        scratch_types=[plgpu.SMEM((size,), dtype)],
        interpret=INTERPRET,
    )
    expected = np.zeros(size, dtype)
    expected[places[places < length]] = values[places < length]
    np.testing.assert_array_equal(run(jnp.asarray(values), jnp.asarray(places)), expected)


def test_a_scalar_chooses_for_all_lanes():
    def kernel(block_id, x, out):
        values = plgpu.load(x, layout=one_per_lane(128))
        out[block_id] = where(block_id == 1, values, -2.0)

    run = launch(
        kernel,
        name="where",
        num_blocks=2,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        interpret=INTERPRET,
    )
    x = jnp.arange(128, dtype=jnp.float32)
    np.testing.assert_array_equal(run(x), [np.full(128, -2.0), x])
