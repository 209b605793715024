"""Random inputs of route_tokens, and what it means for a route to be right."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.router import Route, reference_route_tokens

# Logits are of size 1. What float32 sums over H may be off, and then the weights.
LOGITS_BOUND = 1e-5
WEIGHTS_BOUND = 1e-5


class Size(NamedTuple):
    T: int
    E: int
    K: int
    H: int

    def __str__(self):
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


class Case(NamedTuple):
    x: jax.Array  # [T, H]
    gate: jax.Array  # [E, H]
    norm_weight: jax.Array  # [H]


def make_case(size: Size, seed: int) -> Case:
    """Normal x, logits of size 1, a norm weight near 1."""
    T, E, _, H = size
    keys = jax.random.split(jax.random.key(seed), 3)
    normal, bfloat16 = jax.random.normal, jnp.bfloat16
    return Case(
        x=normal(keys[0], (T, H), bfloat16),
        gate=normal(keys[1], (E, H), bfloat16) * jnp.asarray(H**-0.5, bfloat16),
        norm_weight=1 + normal(keys[2], (H,), bfloat16) / 8,
    )


def assert_right(route: Route, case: Case, K: int, *, norm=False, **keywords) -> None:
    """The route is the reference's, but for float32 rounding where two logits nearly tie."""
    T, E = len(case.x), len(case.gate)
    x = case.x
    if norm:
        expected = reference_route_tokens(x, case.gate, K=K, norm_weight=case.norm_weight).normed
        chex.assert_type(route.normed, jnp.bfloat16)
        # The squares' order may move a value over the edge between two bfloat16.
        off = np.abs(np.asarray(route.normed - expected, np.float32))
        assert np.all(off <= 2**-7 * np.abs(np.asarray(expected, np.float32)))
        assert np.mean(off > 0) < 0.01
        x = route.normed
    else:
        assert route.normed is None
    reference = reference_route_tokens(x, case.gate, K=K, **keywords)
    for name, shape, dtype in (
        ("ids", (T, K), jnp.int32),
        ("weights", (T, K), jnp.float32),
        ("logits", (T, E), jnp.float32),
    ):
        chex.assert_shape(getattr(route, name), shape)
        chex.assert_type(getattr(route, name), dtype)
    chex.assert_trees_all_close(route.logits, reference.logits, rtol=0, atol=LOGITS_BOUND)
    # Exactly the choice that these very logits ask for, ties included.
    chex.assert_trees_all_equal(route.ids, jax.lax.top_k(route.logits, K)[1])
    assert_same_experts(route.ids, reference.ids, x, case.gate)
    probabilities = jax.nn.softmax(route.logits)
    weights = jnp.take_along_axis(probabilities, route.ids, axis=-1)
    if keywords.get("norm_topk_prob", True):
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    chex.assert_trees_all_close(route.weights, weights, rtol=WEIGHTS_BOUND, atol=1e-30)


def assert_same_experts(found, expected, x, gate) -> None:
    """The same set for each token, or another one that is as good in float64."""
    exact = np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T
    for token, (these, those) in enumerate(
        zip(np.asarray(found), np.asarray(expected), strict=True)
    ):
        if set(these.tolist()) != set(those.tolist()):
            least = [exact[token, list(ids)].min() for ids in (these, those)]
            chex.assert_trees_all_close(least[0], least[1], rtol=0, atol=LOGITS_BOUND)
