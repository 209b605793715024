"""The grouped products and their gradients against the float32 oracle; errors; what is lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    GroupedMatmulConfig,
    gather_rows,
    group_assignments,
    grouped_matmul,
    grouped_swiglu,
    reference_grouped_matmul,
)
from pallas_kernels.grouped_matmul.reference import expert_of_rows
from tests.pallas_kernels.decode_experts.lowering_suite import SUM_IN_MEMORY
from tests.pallas_kernels.machine import INTERPRET, kernels_of, lower_for_cuda, mosaic_modules
from tests.pallas_kernels.races import run_and_assert_no_races

T, E, N, OUT = 150, 3, 128, 256
# One expert with two tiles, one without any, one with one row; padding.
RAGGED = np.array([0] * 140 + [2] + [-1] * 9, np.int32)
PATTERNS = {
    "ragged": RAGGED,
    "one expert": np.full(T, 1, np.int32),
    "padding only": np.full(T, -1, np.int32),
}


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.bfloat16)


X, COTANGENT = normal(0, T, N), normal(1, T, OUT)
WEIGHTS = normal(2, E, OUT, N, scale=N**-0.5)
ASSIGNMENTS = group_assignments(RAGGED[:, None], E)
R = ASSIGNMENTS.groups.R


@functools.partial(jax.jit, static_argnums=(0, 1))
def product_and_gradients(product, options, ids, weights):
    """The product of sorted rows, and its gradients to rows and weights; zeros in no group."""
    assignments = group_assignments(ids[:, None], E)
    groups = assignments.groups
    rows, cotangent = (gather_rows(array, assignments) for array in (X, COTANGENT))
    run = functools.partial(product, groups=groups, **dict(options))
    out, pull = jax.vjp(run, rows, weights)
    of_rows, of_weights = pull(cotangent.astype(out.dtype))
    inside = (expert_of_rows(groups) < E)[:, None]  # other rows are undefined
    return jnp.where(inside, out, 0), jnp.where(inside, of_rows, 0), of_weights


KERNELS = grouped_matmul, (("interpret", INTERPRET),)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients(pattern):
    arguments = PATTERNS[pattern], WEIGHTS
    found = product_and_gradients(*KERNELS, *arguments)
    expected = product_and_gradients(reference_grouped_matmul, (), *arguments)
    for one, other in zip(found, expected, strict=True):
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        # Of each row, or of each expert, by itself, so that none hides in another.
        axes = tuple(range(1, one.ndim))
        error = np.sqrt(np.sum((one - other) ** 2, axis=axes))
        assert np.all(error <= 3e-3 * np.sqrt(np.sum(other**2, axis=axes)))  # bfloat16's rounding


def test_no_expert_reaches_another_ones_rows():
    """What lies in unused weights changes nothing, and an inf in one expert stays there."""
    poisoned = WEIGHTS.at[1].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    clean, found = (
        [np.asarray(array) for array in product_and_gradients(*KERNELS, RAGGED, weights)]
        for weights in (WEIGHTS, poisoned)
    )
    of_expert_0 = slice(int(ASSIGNMENTS.groups.num_rows[0]))
    for one, other in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(one[of_expert_0], other[of_expert_0])
        assert not np.isfinite(np.asarray(one, np.float32)).all()
    np.testing.assert_array_equal(found[2], clean[2])  # no weight is in it
    assert not found[2][1].any()


@pytest.mark.skipif(not INTERPRET, reason="the detector is the interpreter's")
def test_no_races():
    # One kernel for all, because what could race is the pipeline that they share.
    rows = gather_rows(X, ASSIGNMENTS)

    @functools.partial(jax.jit, static_argnames="interpret")
    def run(weights, *, interpret):
        return grouped_matmul(rows, weights, ASSIGNMENTS.groups, interpret=interpret)

    run_and_assert_no_races(run, WEIGHTS)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_lowers_for_cuda():
    groups = jax.eval_shape(lambda ids: group_assignments(ids, 128), struct(64, 8, dtype=jnp.int32))

    def loss(rows, gate_up, down, row_weights, groups):
        hidden = grouped_swiglu(rows, gate_up, row_weights, groups)
        outputs = grouped_matmul(jax.lax.stop_gradient(hidden), down, groups)
        return outputs.astype(jnp.float32).sum() + hidden.astype(jnp.float32).sum()

    groups = groups.groups
    rows, row_weights = struct(groups.R, 2048), struct(groups.R, dtype=jnp.float32)
    weights = struct(128, 2, 768, 2048), struct(128, 2048, 768)
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 3))
    text = lower_for_cuda(gradients, rows, *weights, row_weights, groups)
    assert sorted(kernels_of(text)) == [
        "grouped_matmul",
        "grouped_matmul_to_weights",
        "grouped_matmul_transposed",
        "grouped_swiglu",
    ]
    for module in mosaic_modules(text):
        assert "wgmma.mma_async" in module and not SUM_IN_MEMORY.search(module)


@pytest.mark.parametrize(
    ("rows", "weights", "error", "message"),
    [
        (struct(R, N, dtype=jnp.float32), struct(E, OUT, N), NotImplementedError, "rows has dtype"),
        (struct(R, N), struct(E, OUT, N, dtype=jnp.int32), TypeError, "weights has dtype int32"),
        (struct(R + 1, N), struct(E, OUT, N), ValueError, f"rows has shape ({R + 1}, 128)"),
        (struct(R, N), struct(E, OUT, 256), ValueError, f"expected [R, in] = ({R}, 256)"),
        (struct(R, N), struct(E + 1, OUT, N), ValueError, "weights has 4 experts; groups has 3"),
        (struct(R, N), struct(E, 192, N), ValueError, "expected multiples of 128"),
    ],
)
def test_errors_name_the_argument(rows, weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(
            lambda rows, weights: grouped_matmul(rows, weights, ASSIGNMENTS.groups), rows, weights
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"block_n": 64}, "block_n is 64; expected one of [128, 256]"),
     ({"num_stages": 1}, "num_stages is 1; expected one of [2, 3, 4]")],
)  # fmt: skip
def test_configs_that_cannot_be(changes, message):
    config, groups = GroupedMatmulConfig(**changes), ASSIGNMENTS.groups
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            lambda rows, weights: grouped_matmul(rows, weights, groups, config=config),
            struct(R, N),
            struct(E, OUT, N),
        )


def test_gate_and_up_are_two():
    with pytest.raises(ValueError, match=re.escape("(3, 1, 128, 128); expected [E, 2, I, H]")):
        jax.eval_shape(
            lambda *arrays: grouped_swiglu(*arrays, ASSIGNMENTS.groups),
            struct(R, N),
            struct(E, 1, 128, N),
            struct(R, dtype=jnp.float32),
        )


def test_config_changes_no_bits():
    """Other tiles add up in the same order."""
    usual, *_ = product_and_gradients(*KERNELS, RAGGED, WEIGHTS)
    config = GroupedMatmulConfig(block_n=128, num_stages=2)
    rows, groups = gather_rows(X, ASSIGNMENTS), ASSIGNMENTS.groups
    run = functools.partial(grouped_matmul, config=config, interpret=INTERPRET)
    other = jax.jit(run)(rows, WEIGHTS, groups)
    used = slice(int(groups.num_rows.sum()))
    np.testing.assert_array_equal(np.asarray(usual)[used], np.asarray(other)[used])
