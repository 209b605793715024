"""The KV cache's index functions against a plain Python list for each row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import init_cache, slots_of, stored_positions, write
from moe_jax.presets import PRESETS


@jax.jit
def append(stored, new, valid, lengths):
    stored = write(stored, new, slots_of(valid, lengths), valid)
    lengths = lengths + valid.sum(axis=1)
    return stored, lengths, stored_positions(lengths, stored.shape[2])


@pytest.mark.parametrize("C", [3, 8])
def test_rows_hold_the_last_valid_tokens(C):
    """Chunks with padding anywhere: what each slot holds is what a list would hold."""
    rng = np.random.default_rng(0)
    B, kv, D = 3, 2, 4
    stored = jnp.full((B, kv, C, D), -1.0)
    lengths = jnp.zeros(B, jnp.int32)
    rows = [[] for _ in range(B)]
    token = 0
    for S in (1, 4, 2, 5, 1):
        valid = rng.random((B, S)) < 0.7
        new = np.zeros((B, kv, S, D), np.float32)
        for b, s in np.ndindex(B, S):
            token += 1
            new[b, :, s] = token
            if valid[b, s]:
                rows[b].append(token)
        stored, lengths, positions = append(stored, new, valid, lengths)
        positions, held = np.asarray(positions), np.asarray(stored)
        for b in range(B):
            assert int(lengths[b]) == len(rows[b])
            for slot, position in enumerate(positions[b]):
                expected = rows[b][position] if position >= 0 else -1
                assert np.all(held[b, :, slot] == expected)
            seen = sorted(p for p in positions[b].tolist() if p >= 0)
            assert seen == list(range(len(rows[b])))[-C:]


def test_capacity_with_and_without_a_window():
    tiny = PRESETS["tiny"]
    assert init_cache(tiny, 2, 20, jnp.float32).keys[1].shape == (2, 2, 20, 32)
    windowed = dataclasses.replace(tiny, use_sliding_window=True, sliding_window=8)
    assert init_cache(windowed, 2, 20).keys[0].shape == (2, 2, 8, 32)
    assert init_cache(windowed, 2, 4).values[0].shape == (2, 2, 4, 32)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="is 0; expected at least 1"):
        init_cache(PRESETS["tiny"], *sizes)
