"""Random inputs of decode_layer, and what it means for its results to be right."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import quantise
from pallas_kernels.decode_step import (
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
    decode_layer,
    reference_decode_layer,
)
from pallas_kernels.decode_step.layer import PRODUCTS, LayerShapes
from tests.pallas_kernels.machine import INTERPRET

EPS = 1e-5
# What moe_jax/decode_step.py declares for bfloat16; rounding a result alone is 1.7e-3.
RELATIVE_BOUND = 6e-3
# In a small layer a row's logits, or what its experts add, is no mean over many roundings.
SMALL_LAYERS_BOUND = 2 * RELATIVE_BOUND
WEIGHTS_BOUND = 1e-5

# All that no block has written is NaN, so that an element that stays unwritten shows.
POISONED = plgpu.InterpretGPUParams(uninitialized_memory="nan") if INTERPRET else False

_reference = jax.jit(reference_decode_layer, static_argnames=("K", "eps", "norm_topk_prob"))


class Case(NamedTuple):
    """decode_layer's arguments."""

    residual: Residual
    weights: LayerWeights
    keys: jax.Array
    values: jax.Array
    positions: RowPositions


def layer_shapes(B: int, **changes) -> LayerShapes:
    """The smallest layer that has several of everything."""
    sizes = {"H": 128, "heads": 4, "kv": 1, "D": 128, "C": 128, "E": 16, "K": 2, "I": 64}
    return LayerShapes(**({"B": B, "eps": EPS, "norm_topk_prob": True} | sizes | changes))


def qwen3_shapes(B: int, C: int = 512, fp8: tuple[str, ...] = ()) -> LayerShapes:
    """A layer of Qwen3-30B-A3B."""
    return layer_shapes(B, H=2048, heads=32, kv=4, C=C, E=128, K=8, I=768, fp8=fp8)


def make_case(
    s: LayerShapes,
    lengths: Sequence[int],
    seed: int,
    *,
    valid: Sequence[int] | None = None,
    num_parts: int = 0,
) -> Case:
    """What must not matter is bad: keys not stored, rows beyond B, parts of rows not valid are NaN.

    Values that are not stored are large, because weights of zero multiply them.
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    valid = jnp.ones(s.B, jnp.int32) if valid is None else jnp.asarray(valid, jnp.int32)
    return _draw(jax.random.key(seed), lengths, valid, s, num_parts)


@functools.partial(jax.jit, static_argnames=("s", "num_parts"))
def _draw(key, lengths, valid, s: LayerShapes, num_parts: int) -> Case:
    keys = iter(jax.random.split(key, 32))

    def normal(*shape, scale=1.0, dtype=jnp.bfloat16):
        return (scale * jax.random.normal(next(keys), shape, jnp.float32)).astype(dtype)

    def norm(size):
        return (1 + normal(size, scale=1 / 8, dtype=jnp.float32)).astype(jnp.bfloat16)

    B, H, D, E, I = s.B, s.H, s.D, s.E, s.I
    wide, narrow = s.heads * D, s.kv * D
    weights = LayerWeights(
        input_layernorm=norm(H),
        q_proj=normal(wide, H, scale=H**-0.5),
        k_proj=normal(narrow, H, scale=H**-0.5),
        v_proj=normal(narrow, H, scale=H**-0.5),
        q_norm=norm(D),
        k_norm=norm(D),
        o_proj=normal(H, wide, scale=wide**-0.5),
        post_attention_layernorm=norm(H),
        gate=normal(E, H, scale=H**-0.5),
        gate_up=normal(E, 2, I, H, scale=H**-0.5),
        down=normal(E, H, I, scale=I**-0.5),
    )
    scaled = [field for product in s.fp8 for field in PRODUCTS[product]]
    weights = weights._replace(**{name: quantise(getattr(weights, name)) for name in scaled})
    rows = jnp.arange(s.N) < B
    parts = None
    if num_parts:
        counts = jnp.pad(valid, (0, s.N - B)) > 0
        parts = normal(num_parts, s.N, H, scale=num_parts**-0.5, dtype=jnp.float32)
        parts = jnp.where(counts[:, None], parts, jnp.nan)
    angles = normal(2, B, D, scale=3, dtype=jnp.float32)  # both halves unequal
    stored = (jnp.arange(s.C) < lengths[:, None])[:, None, :, None]
    return Case(
        residual=Residual(jnp.where(rows[:, None], normal(s.N, H), jnp.nan), parts),
        weights=weights,
        keys=jnp.where(stored, normal(B, s.kv, s.C, D), jnp.nan),
        values=jnp.where(stored, normal(B, s.kv, s.C, D), 1e30).astype(jnp.bfloat16),
        positions=RowPositions(
            cos=jnp.cos(angles[0]), sin=jnp.sin(angles[1]), lengths=lengths, valid=valid
        ),
    )


def one_row(case: Case, row: int) -> Case:
    """The case of that row alone."""
    which = slice(row, row + 1)
    x, parts, _ = case.residual

    def alone(array):
        padding = [(0, 0)] * (array.ndim - 2) + [(0, 7), (0, 0)]
        return jnp.pad(array[..., which, :], padding, constant_values=jnp.nan)

    return case._replace(
        residual=Residual(alone(x), None if parts is None else alone(parts)),
        keys=case.keys[which],
        values=case.values[which],
        positions=jax.tree.map(lambda array: array[which], case.positions),
    )


def run(case: Case, s: LayerShapes, **keywords) -> LayerStep:
    """decode_layer of the case."""
    keywords = {"interpret": POISONED, "norm_topk_prob": s.norm_topk_prob} | keywords
    return decode_layer(*case, K=s.K, eps=s.eps, **keywords)


def rows_of(step: LayerStep, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """What a step says about some valid rows; rows that are not valid may hold anything."""
    rows = np.asarray(rows)
    found = step._asdict() | step.residual._asdict()
    del found["residual"], found["mailboxes"]
    found["parts"] = jnp.swapaxes(found["parts"], 0, 1)  # [N, number, H]
    return {name: np.asarray(array)[rows] for name, array in found.items()}


def assert_same_rows(found: LayerStep, rows, expected: LayerStep, expected_rows=None) -> None:
    """The same bits in some rows of two steps; a NaN of a key that is not stored equals itself."""
    found = rows_of(found, rows)
    expected = rows_of(expected, rows if expected_rows is None else expected_rows)
    for name, array in found.items():
        other = expected[name]
        assert (array.shape, array.dtype) == (other.shape, other.dtype), name
        same = array.view(np.uint8) == other.view(np.uint8)
        assert same.all(), f"{name} differs in {np.count_nonzero(~same)} of {same.size} bytes"


def assert_right(step: LayerStep, case: Case, s: LayerShapes) -> None:
    """The reference's within the bound, row by row; another expert only where it is a near-tie.

    The caches are the given ones bit for bit but for the new slots.
    """
    expected = _reference(*case, K=s.K, eps=s.eps, norm_topk_prob=s.norm_topk_prob)
    for name, shape, dtype in (
        ("ids", (s.B, s.K), jnp.int32),
        ("weights", (s.B, s.K), jnp.float32),
        ("logits", (s.B, s.E), jnp.float32),
        ("keys", case.keys.shape, jnp.bfloat16),
        ("values", case.values.shape, jnp.bfloat16),
    ):
        array = getattr(step, name)
        assert (array.shape, array.dtype) == (shape, dtype), name
    assert step.residual.x.shape == (s.N, s.H) and step.residual.x.dtype == jnp.bfloat16
    valid = np.asarray(case.positions.valid) > 0
    _assert_caches_right(step, case, expected)
    assert (np.asarray(step.ids)[~valid] == -1).all()

    x = np.asarray(step.residual.x[: s.B].astype(jnp.float32))
    y = np.asarray(jnp.sum(step.residual.parts[:, : s.B], axis=0))
    ids, weights, logits = (np.asarray(a) for a in (step.ids, step.weights, step.logits))
    expected = {name: np.asarray(expected[name]) for name in ("x", "y", "logits", "ids")}
    chosen = best_experts(logits, s.K)
    bound = RELATIVE_BOUND if s.H >= 1024 else SMALL_LAYERS_BOUND
    for row in np.flatnonzero(valid):
        _assert_close("x", row, x[row], expected["x"][row])
        _assert_close("logits", row, logits[row], expected["logits"][row], bound)
        # Exactly the choice that these very logits ask for, ties included.
        np.testing.assert_array_equal(ids[row], chosen[row])
        np.testing.assert_allclose(
            weights[row], weights_of(logits[row], ids[row], s.norm_topk_prob), rtol=WEIGHTS_BOUND
        )
        if set(ids[row]) == set(expected["ids"][row]):
            _assert_close("y", row, y[row], expected["y"][row], bound)
            total = expected["x"][row] + expected["y"][row]
            _assert_close("x + y", row, x[row] + y[row], total)
        else:
            off = np.abs(logits[row] - expected["logits"][row]).max()
            exact = expected["logits"][row]
            gap = exact[expected["ids"][row]].min() - exact[ids[row]].min()
            assert gap <= 2 * off, f"row {row} has other experts: {ids[row]}, by {gap}"


def _assert_caches_right(step: LayerStep, case: Case, expected: dict[str, jax.Array]) -> None:
    C = case.keys.shape[2]
    positions = case.positions
    is_new = jnp.arange(C) == (positions.lengths % C)[:, None]
    is_new = (is_new & (positions.valid > 0)[:, None])[:, None, :, None]  # [B, 1, C, 1]
    for name in ("keys", "values"):
        found, before = getattr(step, name), getattr(case, name)
        bits = [array.view(jnp.uint16) for array in (found, before)]
        unlike = jnp.count_nonzero((bits[0] != bits[1]) & ~is_new)
        assert unlike == 0, f"{unlike} elements of {name} changed that are not the new token's"
        new, wanted = (
            np.asarray(jnp.sum(jnp.where(is_new, array.astype(jnp.float32), 0), axis=2))
            for array in (found, expected[name])
        )
        for row in np.flatnonzero(np.asarray(positions.valid)):
            _assert_close(f"the new {name}", row, new[row], wanted[row])


def _assert_close(name: str, row: int, found, expected, bound: float = RELATIVE_BOUND) -> None:
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < bound, f"{name} of row {row}: relative error {error}, above {bound}"


def best_experts(logits: np.ndarray, K: int) -> np.ndarray:
    """[T, K] int32: the K largest logits of each token; of equal ones the lower index first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :K].astype(np.int32)


def weights_of(logits: np.ndarray, ids: np.ndarray, norm_topk_prob: bool) -> np.ndarray:
    """[..., K]: the softmax of one or several tokens' logits, at their experts."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chosen = np.take_along_axis(exponentials, ids, axis=-1)
    counted = chosen if norm_topk_prob else exponentials
    return chosen / counted.sum(axis=-1, keepdims=True)


@functools.cache
def struct_case(s: LayerShapes, num_parts: int = 0) -> Case:
    """The case as shapes and dtypes only."""
    return jax.eval_shape(lambda: make_case(s, [0] * s.B, 0, num_parts=num_parts))
