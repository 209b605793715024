"""The tests' own tools can fail: a kernel that leaves elements unwritten shows under poison."""

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from tests.pallas_kernels.machine import calls_with_poisoned_output, lower_for_cuda, mosaic_modules

COLUMNS = 128


def first_row_only(x, *, interpret):
    """Copies x's first row and leaves the second one of the output as it is."""

    def kernel(block_id, x_gmem, out_gmem):
        out_gmem[0, :] = plgpu.load(x_gmem.at[0], layout=plgpu.Layout.WG_STRIDED((COLUMNS,), 1))

    return launch(
        kernel,
        name="first_row_only",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((2, COLUMNS), jnp.float32),
        interpret=interpret,
    )(x)


def test_an_unwritten_element_shows_as_nan():
    x = jax.random.normal(jax.random.key(0), (2, COLUMNS))
    for out in calls_with_poisoned_output(first_row_only, x):
        chex.assert_trees_all_equal(out[0], x[0])
        chex.assert_trees_all_equal(jnp.isnan(out[1]), jnp.ones(COLUMNS, bool))


def test_lowered_kernels_can_be_read():
    text = lower_for_cuda(
        lambda x: first_row_only(x, interpret=False) * 2,
        jax.ShapeDtypeStruct((2, 128), jnp.float32),
    )
    [module] = mosaic_modules(text)
    assert module.startswith("module") or "builtin.module" in module
    assert "stablehlo.multiply" in text
