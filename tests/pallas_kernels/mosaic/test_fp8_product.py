"""FP8 weights times tokens: every byte, both kinds of tokens, and what f16 could not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import VALUES_DTYPE
from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.fp8_mma import GROUP, store_by_token
from pallas_kernels.mosaic.fp8_operand import COLUMNS
from pallas_kernels.mosaic.fp8_product import Fp8Product
from pallas_kernels.mosaic.warpgroup import sync_lanes
from tests.pallas_kernels.machine import INTERPRET

ROWS = 2 * GROUP
EVERY_BYTE = np.arange(256, dtype=np.uint8).view(VALUES_DTYPE)


def multiply(weights, scales, tokens):
    """[ROWS, K] e4m3 times scales [2, K / COLUMNS] times tokens [N, K]: [N, ROWS] float32."""
    N, K = tokens.shape
    product = Fp8Product(
        rows=ROWS,
        columns=K,
        N=N,
        block_k=COLUMNS,
        num_stages=1,
        dtype=tokens.dtype,
        scale_rows=2,
    )

    def kernel(block_id, weights, scales, tokens, out, shared, out_smem, full):
        product.load_scales(shared, [scales.at[row] for row in range(2)])

        def step(index, totals):
            at = pl.ds(index * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(weights.at[:, :, at], shared[0].at[0], full)
            plgpu.copy_gmem_to_smem(tokens.at[:, at], shared[1].at[0], full)
            plgpu.barrier_wait(full)
            product.prepare(shared, index, 0)
            sync_lanes()
            totals = product.compute(shared, index, 0, totals)
            plgpu.commit_smem()
            return totals

        totals = lax.fori_loop(0, K // COLUMNS, step, product.zeros())
        for group, total in enumerate(totals):
            store_by_token(total, out_smem.at[:, pl.ds(group * GROUP, GROUP)])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel,
        name="multiply",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((N, ROWS), jnp.float32),
        scratch_types={
            "shared": product.shared_types(),
            "out_smem": plgpu.SMEM((N, ROWS), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2),
        },
        interpret=INTERPRET,
    )(*map(jnp.asarray, (weights.reshape(2, GROUP, K), scales, tokens)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_byte_is_converted_exactly(dtype):
    """One-hot tokens pick columns; 256 bytes are four columns of 64 rows."""
    weights = np.zeros((ROWS, COLUMNS), VALUES_DTYPE)
    columns = (0, 33, 70, 127)  # of each lane in four
    weights[:, columns] = EVERY_BYTE.reshape(ROWS, 4)
    tokens = np.zeros((8, COLUMNS), dtype)
    for token, column in enumerate(columns):
        tokens[token, column] = 1
    out = np.asarray(multiply(weights, np.ones((2, 1), np.float32), tokens))
    expected = np.tile(weights.astype(np.float32)[:, columns].T, (2, 1))
    expected[4:] = 0  # what tokens of zeros pick
    # A NaN in a row is in each of its products.
    expected[:, np.isnan(weights.astype(np.float32)).any(axis=1)] = np.nan
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(out).any()


def _mixed(rng, shape):
    """From 1e-30 to 1e4: some tokens are all small, some all large, some have both."""
    exponents = rng.uniform(-30, 4, shape)
    exponents[0::4] = -30
    exponents[1::4] = 4
    exponents[2::4, ::2] = -30
    return rng.normal(size=shape) * 10.0**exponents


@pytest.mark.parametrize("N", [8, 24])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tokens_of_any_size(dtype, N, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(ROWS, 3 * COLUMNS)).astype(VALUES_DTYPE)
    scales = rng.uniform(1e-3, 1, (2, 3)).astype(np.float32)
    tokens = jnp.asarray(_mixed(rng, (N, 3 * COLUMNS)), dtype)
    out = np.asarray(multiply(weights, scales, tokens), np.float64)
    wide = np.repeat(np.repeat(scales, GROUP, axis=0), COLUMNS, axis=1).astype(np.float64)
    expected = np.asarray(tokens, np.float64) @ (weights.astype(np.float64) * wide).T
    error = np.linalg.norm(out - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-6


def test_zeros_infinity_and_nan_stay_with_their_token(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(8, COLUMNS)).astype(jnp.bfloat16)
    tokens[1], tokens[2, 5], tokens[3, 6] = 0, np.inf, np.nan
    weights = np.full((ROWS, COLUMNS), 0.5, VALUES_DTYPE)
    out = np.asarray(multiply(weights, np.ones((2, 1), np.float32), tokens))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(out[2], np.inf)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, [2, 3], axis=0)).all()
