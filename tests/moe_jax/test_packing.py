"""Several sequences in one row: each is computed by itself, however it is said where they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention.xla import visible_keys
from moe_jax.losses import cross_entropy
from moe_jax.model import Qwen3Moe
from moe_jax.packing import next_tokens, places_in_segments, segments_of
from tests.moe_jax.tiny import TINY, S, close, model_of, random_ids, run

FIRST = 7  # tokens of a row's first sequence, of S = 11
POSITIONS = jnp.array([[*range(FIRST), *range(S - FIRST)]])


def test_the_example_of_the_docstring():
    valid = jnp.array([[True] * 5 + [False]])
    segments = segments_of(jnp.array([[0, 1, 2, 0, 1, 2]]))
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert next_tokens(valid, segments).tolist() == [[1, 2, 6, 4, 6, 6]]
    assert places_in_segments(segments, valid).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_positions_that_jump_begin_a_sequence_too():
    positions = jnp.array([[4, 5, 9, 10, 2], [0, 1, 2, 3, 4]])
    assert segments_of(positions).tolist() == [[0, 0, 1, 1, 2], [0] * 5]


def test_padding_between_and_within_sequences():
    segments, valid = jnp.array([[8, 8, 8, 8, 3, 3]]), jnp.array([[1, 0, 1, 1, 0, 1]]) > 0
    assert next_tokens(valid, segments).tolist() == [[2, 6, 3, 6, 6, 6]]
    assert next_tokens(valid).tolist() == [[2, 6, 3, 5, 6, 6]]
    assert places_in_segments(segments, valid).tolist() == [[0, 1, 1, 2, 0, 0]]


@pytest.mark.parametrize("window", [None, 2])
def test_visible_keys(window):
    slots, segments = jnp.arange(5)[None], jnp.array([[0, 0, 0, 1, 1]])
    visible = np.asarray(visible_keys(slots, slots, window, segments))[0]
    for q, k in np.ndindex(5, 5):
        near = window is None or q - k < window
        assert visible[q, k] == (k <= q and segments[0, q] == segments[0, k] and near)


@pytest.mark.parametrize("place", ["left", "right", "middle"])
def test_the_loss_of_a_padded_row_is_that_of_the_row(place):
    logits = np.random.default_rng(0).normal(size=(1, 4, 9)).astype(np.float32)
    labels = np.array([[1, 2, 3, 4]])
    columns = {"left": [3, 4, 5, 6], "right": [0, 1, 2, 3], "middle": [1, 2, 5, 6]}[place]
    # Padding holds what would show: a label that counts, logits that are NaN.
    padded, also = np.full((1, 7, 9), np.nan, np.float32), np.zeros((1, 7), int)
    padded[:, columns], also[:, columns] = logits, labels
    valid = np.isin(np.arange(7), columns)[None]
    loss = jax.jit(cross_entropy)
    np.testing.assert_allclose(loss(padded, also, valid=valid), loss(logits, labels), rtol=1e-6)


def apart(model: Qwen3Moe, ids):
    """Each sequence of packed ids [2, S] in a row of its own: logits [2, S, V], and the losses."""
    rows = jnp.concatenate([ids[:, :FIRST], ids[:, FIRST:]], axis=1)  # for the shapes
    logits, losses = [], []
    for row in rows:
        parts = jnp.zeros((2, S), jnp.int32)
        parts = parts.at[0, :FIRST].set(row[:FIRST]).at[1, : S - FIRST].set(row[FIRST:])
        mask = jnp.arange(S) < jnp.array([[FIRST], [S - FIRST]])
        output = run(model, parts, None, mask.astype(jnp.int32), parts)
        logits.append(jnp.concatenate([output.logits[0, :FIRST], output.logits[1, : S - FIRST]]))
        losses.append(output.loss)
    return jnp.stack(logits), jnp.mean(jnp.stack(losses))


@jax.jit
def packed(model, ids, position_ids=None, segment_ids=None):
    return model(ids, labels=ids, position_ids=position_ids, segment_ids=segment_ids)


def test_packed_sequences_are_computed_apart():
    model, ids = model_of(TINY), random_ids()
    logits, loss = apart(model, ids)
    # Ids of segments may be any; they need no position_ids, and are enough by themselves.
    segments = jnp.where(jnp.arange(S) < FIRST, 5, 2) * jnp.ones((2, 1), jnp.int32)
    for output in (packed(model, ids, POSITIONS), packed(model, ids, segment_ids=segments)):
        close(output.logits, logits)
        np.testing.assert_allclose(output.loss, loss, rtol=1e-5)


def test_a_mask_says_that_positions_that_restart_are_one_sequence():
    """As in transformers, which looks for packed sequences where there is no mask."""
    model, ids = model_of(TINY), random_ids()
    mask = jnp.ones(ids.shape, jnp.int32)
    whole = jax.jit(lambda model: model(ids, position_ids=POSITIONS, attention_mask=mask).logits)
    separate = packed(model, ids, POSITIONS).logits
    assert float(jnp.max(jnp.abs(whole(model) - separate)[:, FIRST:])) > 0.1
