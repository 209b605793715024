"""FP8 weights times tokens: every byte, both kinds of tokens, and what f16 could not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import VALUES_DTYPE
from pallas_kernels.mosaic import fp8_product
from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.fp8_mma import GROUP, store_column
from pallas_kernels.mosaic.fp8_operand import COLUMNS
from pallas_kernels.mosaic.fp8_product import Fp8Product
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.pipeline import mainloop, prologue
from tests.pallas_kernels.machine import INTERPRET

ROWS = 2 * GROUP
EVERY_BYTE = np.arange(256, dtype=np.uint8).view(VALUES_DTYPE)


def multiply(weights, scales, tokens, block_k=COLUMNS, steps_at_once=1):
    """[ROWS, K] e4m3 times scales [2, K / COLUMNS] times tokens [T, K]: [T, ROWS] float32."""
    T, K = tokens.shape
    N = round_up(T, 8)
    product = Fp8Product(
        rows=ROWS,
        columns=K,
        N=N,
        T=T,
        block_k=block_k,
        num_stages=2,
        dtype=tokens.dtype,
        scale_rows=2,
        steps_at_once=steps_at_once,
    )

    def kernel(block_id, weights, scales, tokens, out, shared, full):
        def load(step, stage):
            piece = weights.at[:, :, pl.ds(step * block_k, block_k)]
            copy_evict_first(piece, shared[0].at[stage], full.at[stage], by_one_lane=True)

        prologue(product.num_steps, product.num_stages, load)
        product.start_scales(shared, [scales.at[row] for row in range(2)])
        wanted = [block_id == 0] * T  # all of them
        loaded = product.load_tokens(tokens, wanted)
        totals = product.multiply(shared, full, load, tokens, wanted, loaded)
        for token in range(T):
            store_column(totals, token, out.at[pl.ds(token, 1)])

    return launch(
        kernel,
        name="multiply",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((T, ROWS), jnp.float32),
        scratch_types={
            "shared": product.shared_types(),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=product.num_stages),
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


@pytest.mark.parametrize("T", [1, 5, 8, 24])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tokens_of_any_size(dtype, T, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(ROWS, 3 * COLUMNS)).astype(VALUES_DTYPE)
    scales = rng.uniform(1e-3, 1, (2, 3)).astype(np.float32)
    tokens = jnp.asarray(_mixed(rng, (T, 3 * COLUMNS)), dtype)
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


def test_tokens_in_chunks_have_the_same_bits(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(ROWS, 6 * COLUMNS)).astype(VALUES_DTYPE)
    scales = rng.uniform(1e-3, 1, (2, 6)).astype(np.float32)
    tokens = jnp.asarray(_mixed(rng, (8, 6 * COLUMNS)), jnp.bfloat16)
    at_once = multiply(weights, scales, tokens)
    # Four steps' tokens would fit, and three of them divide the six.
    monkeypatch.setattr(fp8_product, "OPERAND_BYTES", 4 * 2 * 8 * COLUMNS)
    np.testing.assert_array_equal(multiply(weights, scales, tokens), at_once)


@pytest.mark.parametrize("T, steps, chunk_steps, taken", [(1, 6, 6, 2), (8, 6, 2, 2), (1, 3, 3, 1)])
def test_two_steps_a_round_have_the_same_bits(monkeypatch, T, steps, chunk_steps, taken, seed):
    """Where two do not divide the steps, they are taken one by one."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(ROWS, steps * COLUMNS)).astype(VALUES_DTYPE)
    scales = rng.uniform(1e-3, 1, (2, steps)).astype(np.float32)
    tokens = jnp.asarray(_mixed(rng, (T, steps * COLUMNS)), jnp.bfloat16)
    rounds = []

    def noted(*args, several, **options):
        rounds.append(several)
        return mainloop(*args, several=several, **options)

    monkeypatch.setattr(fp8_product, "mainloop", noted)
    monkeypatch.setattr(fp8_product, "OPERAND_BYTES", chunk_steps * 2 * T * COLUMNS)
    one, two = (multiply(weights, scales, tokens, steps_at_once=count) for count in (1, 2))
    np.testing.assert_array_equal(two, one)
    assert rounds == [1, taken]


@pytest.mark.parametrize("steps, stages, take", [(3, 2, print), (4, 1, print), (4, 2, None)])
def test_steps_that_no_round_can_take(steps, stages, take):
    with pytest.raises(ValueError, match=f"several is 2 for {steps} steps; expected a divisor"):
        mainloop(steps, stages, load=None, compute=None, init=(), take=take, several=2)
