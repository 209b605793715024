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
    gather_weights,
    group_assignments,
    grouped_matmul,
    grouped_swiglu,
    reference_grouped_matmul,
)
from pallas_kernels.grouped_matmul.reference import expert_of_rows
from tests.pallas_kernels.decode_experts.lowering_suite import SUM_IN_MEMORY
from tests.pallas_kernels.machine import INTERPRET, kernels_of, lower_for_cuda, mosaic_modules
from tests.pallas_kernels.races import run_and_assert_no_races

T, K, E, H, I = 150, 1, 3, 128, 128
# One expert with two tiles, one with one row, one without any; padding.
RAGGED = np.array([0] * 140 + [2] + [-1] * 9, np.int32)
PATTERNS = {
    "ragged": RAGGED,
    "one expert": np.full(T, 1, np.int32),
    "padding only": np.full(T, -1, np.int32),
    "scattered": np.random.default_rng(0).integers(-1, E + 1, T).astype(np.int32),
}


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.bfloat16)


X = normal(0, T, H)
GATE_UP = normal(1, E, 2, I, H, scale=H**-0.5)
WEIGHTS = jnp.asarray(np.random.default_rng(2).random((T, K)), jnp.float32)
DOWN = normal(3, E, H, I, scale=I**-0.5)
COTANGENT = normal(4, T, H)
ASSIGNMENTS = group_assignments(RAGGED[:, None], E)
R = ASSIGNMENTS.groups.R


def gradients(chain, ids, gate_up, down):
    """Chain's output and its gradients to rows, gate_up, down and row weights; no group's are 0."""
    assignments = group_assignments(ids[:, None], E)
    groups = assignments.groups
    rows, cotangent = (gather_rows(array, assignments) for array in (X, COTANGENT))
    row_weights = gather_weights(WEIGHTS, assignments)
    out, pull = jax.vjp(
        lambda *operands: chain(*operands, groups), rows, gate_up, down, row_weights
    )
    of_rows, of_gate_up, of_down, of_weights = pull(cotangent.astype(out.dtype))
    inside = expert_of_rows(groups) < E  # other rows are undefined
    out, of_rows = (jnp.where(inside[:, None], array, 0) for array in (out, of_rows))
    return out, of_rows, of_gate_up, of_down, jnp.where(inside, of_weights, 0)


@functools.partial(jax.jit, static_argnums=0)
def by_kernels(interpret, *arguments):
    def chain(rows, gate_up, down, row_weights, groups):
        hidden = grouped_swiglu(rows, gate_up, row_weights, groups, interpret=interpret)
        return grouped_matmul(hidden, down, groups, interpret=interpret)

    return gradients(chain, *arguments)


@jax.jit
def by_oracle(*arguments):
    def chain(rows, gate_up, down, row_weights, groups):
        projected = reference_grouped_matmul(rows, gate_up.reshape(E, 2 * I, H), groups)
        hidden = row_weights[:, None] * jax.nn.silu(projected[:, :I]) * projected[:, I:]
        return reference_grouped_matmul(hidden, down, groups)

    return gradients(chain, *arguments)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients(pattern):
    arguments = PATTERNS[pattern], GATE_UP, DOWN
    for found, expected in zip(
        by_kernels(INTERPRET, *arguments), by_oracle(*arguments), strict=True
    ):
        found, expected = (np.asarray(array, np.float64) for array in (found, expected))
        # Of each expert by itself, where there are experts, so that none hides in another.
        axes = tuple(range(found.ndim > 2, found.ndim))
        error = np.sqrt(np.sum((found - expected) ** 2, axis=axes))
        size = np.sqrt(np.sum(expected**2, axis=axes))
        # bfloat16: hidden and outputs forward; hidden, gate and up and their gradients backward.
        assert np.all(error <= 8e-3 * size)


def test_no_expert_reaches_another_ones_rows():
    """What lies in unused weights changes nothing, and an inf in one expert stays there."""
    poisoned = GATE_UP.at[1].set(jnp.nan).at[2, 0, 0, 0].set(jnp.inf), DOWN.at[1].set(jnp.inf)
    clean, found = (
        [np.asarray(array) for array in by_kernels(INTERPRET, RAGGED, *weights)]
        for weights in ((GATE_UP, DOWN), poisoned)
    )
    of_expert_0 = slice(int(ASSIGNMENTS.groups.num_rows[0]))
    for array in range(2):  # outputs, gradients to rows
        np.testing.assert_array_equal(found[array][of_expert_0], clean[array][of_expert_0])
    for array in range(2, 4):  # gradients to weights
        np.testing.assert_array_equal(found[array][:2], clean[array][:2])
        assert not found[array][1].any()
    assert not np.isfinite(np.asarray(found[2][2], np.float32)).all()


@pytest.mark.skipif(not INTERPRET, reason="the detector is the interpreter's")
def test_no_races():
    # One kernel for all, because what could race is the pipeline that they share.
    rows = gather_rows(X, ASSIGNMENTS)

    @functools.partial(jax.jit, static_argnames="interpret")
    def run(weights, *, interpret):
        return grouped_matmul(rows, weights, ASSIGNMENTS.groups, interpret=interpret)

    run_and_assert_no_races(run, GATE_UP.reshape(E, 2 * I, H))


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_lowers_for_cuda():
    def loss(x, gate_up, down, weights, ids):
        assignments = group_assignments(ids, 128)
        groups = assignments.groups
        rows, row_weights = gather_rows(x, assignments), gather_weights(weights, assignments)
        hidden = grouped_swiglu(rows, gate_up, row_weights, groups)
        return grouped_matmul(hidden, down, groups).astype(jnp.float32).sum()

    arguments = struct(64, 2048), struct(128, 2, 768, 2048), struct(128, 2048, 768)
    weights, ids = struct(64, 8, dtype=jnp.float32), struct(64, 8, dtype=jnp.int32)
    text = lower_for_cuda(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), *arguments, weights, ids)
    assert sorted(set(kernels_of(text))) == [
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
        (struct(R, H, dtype=jnp.float32), struct(E, I, H), NotImplementedError, "rows has dtype"),
        (struct(R, H), struct(E, I, H, dtype=jnp.int32), TypeError, "weights has dtype int32"),
        (struct(R + 1, H), struct(E, I, H), ValueError, f"rows has shape ({R + 1}, 128)"),
        (struct(R, H), struct(E, I, 256), ValueError, f"expected [R, in] = ({R}, 256)"),
        (struct(R, H), struct(E + 1, I, H), ValueError, "weights has 4 experts; groups has 3"),
        (struct(R, H), struct(E, 192, H), ValueError, "expected multiples of 128"),
    ],
)
def test_errors_name_the_argument(rows, weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(
            lambda rows, weights: grouped_matmul(rows, weights, ASSIGNMENTS.groups), rows, weights
        )


def test_config_changes_no_bits():
    """Other tiles add up in the same order."""
    groups, rows = ASSIGNMENTS.groups, gather_rows(X, ASSIGNMENTS)
    weights = normal(5, E, 256, H)
    run = jax.jit(
        lambda rows, config: grouped_matmul(
            rows, weights, groups, config=config, interpret=INTERPRET
        ),
        static_argnums=1,
    )
    usual, other = (
        run(rows, config)[: int(groups.num_rows.sum())]
        for config in (GroupedMatmulConfig(), GroupedMatmulConfig(block_n=128, num_stages=2))
    )
    np.testing.assert_array_equal(np.asarray(usual), np.asarray(other))
