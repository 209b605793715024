"""Integers of every dtype index as int32 ones do: in int8, `ids < 128` would compare with -128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import ExpertWeights, experts
from moe_jax.integers import int32_ids
from moe_jax.layers import embed
from moe_jax.losses import cross_entropy
from moe_jax.packing import segments_of
from moe_jax.rope import RopeConfig, rope_tables
from moe_jax.routing import replay_route

E = 256  # 0 in int8 and in uint8
NARROW = (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16)
IDS = np.array([[3, 100], [127, 0], [5, 6]], np.int32)


def same_in_every_dtype(function, array):
    """One program for all dtypes: the results are equal, bit for bit."""
    arrays = [jnp.asarray(array, dtype) for dtype in (jnp.int32, *NARROW)]
    expected, *others = jax.jit(lambda arrays: [function(a) for a in arrays])(arrays)
    assert np.isfinite(jax.tree.leaves(expected)[0]).all()
    for dtype, found in zip(NARROW, others, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=dtype.__name__)
    return expected


@pytest.mark.parametrize("backend", ["portable", "grouped"])
def test_experts(backend):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = ExpertWeights(
        gate_up=jax.random.normal(keys[0], (E, 2, 4, 8)),
        down=jax.random.normal(keys[1], (E, 8, 4)),
    )
    x = jax.random.normal(keys[2], (3, 8))
    w = jnp.full(IDS.shape, 0.5)
    y = same_in_every_dtype(lambda ids: experts(x, weights, ids, w, backend=backend), IDS)
    assert (np.abs(y).max(axis=1) > 0.01).all()


def test_a_replayed_route():
    logits = jax.random.normal(jax.random.key(0), (3, E))
    routing = same_in_every_dtype(
        lambda ids: replay_route(logits, ids, None, norm_topk_prob=True), IDS
    )
    assert routing.ids.tolist() == IDS.tolist()


def test_tokens_labels_and_positions():
    table = jax.random.normal(jax.random.key(0), (E, 3))
    same_in_every_dtype(lambda ids: embed(ids, table), IDS)
    logits = jax.random.normal(jax.random.key(1), (3, 2, E))
    same_in_every_dtype(lambda labels: cross_entropy(logits, labels), IDS)
    # 127 is the last of the batch, so it decides dynamic's frequencies.
    rope = RopeConfig(kind="dynamic", factor=4.0)
    same_in_every_dtype(lambda ids: rope_tables(rope, 4, 64, ids, jnp.float32), IDS)
    assert segments_of(jnp.array([[254, 255, 0]], jnp.uint8)).tolist() == [[0, 0, 1]]


def test_what_is_outside_stays_outside():
    for ids in (np.array([-1, 5], np.int8), np.array([200, 5], np.uint8)):
        assert int32_ids(ids, 128).tolist() == [128, 5]
    assert int32_ids(np.array([2**32 - 1, 2**31 + 5, 5], np.uint32), 128).tolist() == [128, 128, 5]
