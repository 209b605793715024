"""Launches whose outputs take the place of inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from tests.pallas_kernels.machine import INTERPRET, lower_for_cuda, mosaic_modules


def store_row(rows: jax.Array, row: jax.Array, at: jax.Array, scratch_types, interpret=INTERPRET):
    """(rows with `row` in the place that `at` names, that row before), rows in place."""

    def kernel(block_id, _, row_gmem, at_gmem, rows_gmem, before_gmem, *scratch, smem=None):
        del block_id
        [smem] = scratch or [smem]
        place = at_gmem[0]
        smem[...] = rows_gmem[place]
        before_gmem[...] = smem[...]
        rows_gmem[place] = row_gmem[...]

    return launch(
        kernel,
        name="store_row",
        num_blocks=1,
        out_type=[jax.typeof(rows), jax.typeof(row)],
        scratch_types=scratch_types,
        in_place={0: 0},
        interpret=interpret,
    )(rows, row, at)


_SMEM = plgpu.SMEM((128,), jnp.float32)


@pytest.mark.parametrize("scratch_types", [[_SMEM], {"smem": _SMEM}], ids=["sequence", "dict"])
def test_an_output_in_place_keeps_what_is_not_written(scratch_types, seed):
    values = np.random.default_rng(seed).standard_normal((4, 128), np.float32)
    rows, row, at = jnp.asarray(values[:3]), jnp.asarray(values[3]), jnp.array([1], jnp.int32)
    stored, before = jax.jit(lambda *a: store_row(*a, scratch_types))(rows, row, at)
    np.testing.assert_array_equal(stored, values[[0, 3, 2]])
    np.testing.assert_array_equal(before, values[1])
    # The caller's array is another one.
    np.testing.assert_array_equal(rows, values[:3])


def test_lowered_an_output_in_place_is_the_input():
    struct = jax.ShapeDtypeStruct
    text = lower_for_cuda(
        lambda *arguments: store_row(*arguments, [_SMEM], interpret=False),
        struct((3, 128), jnp.float32),
        struct((128,), jnp.float32),
        struct((1,), jnp.int32),
    )
    assert "output_tuple_indices = [0], operand_index = 0" in text
    assert len(mosaic_modules(text)) == 1


@pytest.mark.skipif(not INTERPRET, reason="threads of the CPU client")
def test_interpreted_warpgroups_need_threads(monkeypatch):
    """With fewer, warpgroups that wait for each other would hang."""
    monkeypatch.setenv("NPROC", "5")
    call = launch(
        lambda *_: None,
        name="three",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((1,), jnp.float32),
        num_warpgroups=3,
        interpret=True,
    )
    with pytest.raises(
        RuntimeError, match=r"three has 3 warpgroups.* takes 6 .*; it has 5: set NPR"
    ):
        jax.eval_shape(call)
