"""Routings are what they say, bytes are counted as by hand, a bad trace is refused by name."""

import dataclasses

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench import routings as bench
from experiments.bench.routings import (
    MADE_UP,
    DrawnRouting,
    make_routings,
    read_trace_ids,
    short_name,
)
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES as PRESETS

SHAPES = ExpertShapes(E=16, K=4, H=64, I=64)


@given(
    routing=st.sampled_from(MADE_UP),
    E=st.integers(1, 40),
    K=st.integers(1, 8),
    T=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_made_up_routings(routing, E, K, T, seed):
    K = min(K, E)
    shapes = ExpertShapes(E=E, K=K, H=64, I=64)
    for ids, weights in make_routings(routing, shapes, T, 2, seed):
        chex.assert_shape([ids, weights], (T, K))
        assert ids.dtype == np.int32
        assert weights.dtype == np.float32
        assert ids.min() >= 0
        assert ids.max() < E
        assert (weights > 0).all()
        chex.assert_trees_all_close(weights.sum(axis=1), np.ones(T), rtol=1e-5)
        if routing == "one_expert":
            assert np.unique(ids).size == 1
        else:
            assert all(np.unique(row).size == K for row in ids)
        if routing == "balanced":
            load = np.bincount(ids.ravel(), minlength=E)
            assert load.max() - load.min() <= 1


def test_same_seed_same_routings_and_each_is_new():
    first, again = (make_routings("uniform", SHAPES, 8, 3, 5) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first[0].expert_ids, first[1].expert_ids)


@pytest.mark.parametrize("routing", ["zipf", "hotspot"])
def test_skewed_routings_touch_fewer_experts(routing):
    def unique(kind):
        shapes = ExpertShapes(E=128, K=8, H=64, I=64)
        routings = make_routings(kind, shapes, 16, 8, 0)
        return np.mean([np.unique(r.expert_ids).size for r in routings])

    assert unique(routing) < unique("uniform") - 5


def test_unknown_routing_is_refused():
    with pytest.raises(ValueError, match=r"routing is 'normal'; expected uniform, balanced, zipf"):
        make_routings("normal", SHAPES, 1, 1, 0)


def test_trace_rows_are_drawn(tmp_path):
    path = tmp_path / "trace.npz"
    ids = np.stack([np.arange(4) + n for n in range(12)]).reshape(2, 6, 4)
    np.savez(path, expert_ids=ids)
    routings = make_routings(f"trace:{path}", SHAPES, 6, 2, 0)
    for layer, routing in enumerate(routings):  # as many tokens as rows: each row once
        drawn = routing.expert_ids[np.argsort(routing.expert_ids[:, 0])]
        chex.assert_trees_all_equal(drawn, ids[layer].astype(np.int32))
    assert make_routings(f"trace:{path}", SHAPES, 50, 1, 0)[0].expert_ids.shape == (50, 4)
    assert short_name(f"trace:{path}") == "trace:trace"
    assert short_name("zipf") == "zipf"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": np.zeros((3, 4), int)}, "expected a field `expert_ids`"),
        ({"expert_ids": np.zeros((3, 4))}, "expert_ids has dtype float64; expected integers"),
        ({"expert_ids": np.zeros(4, int)}, r"expert_ids has shape \(4,\)"),
        ({"expert_ids": np.zeros((0, 4), int)}, r"expert_ids has shape \(0, 4\)"),
        ({"expert_ids": np.zeros((3, 2), int)}, "expert_ids has K = 2; the preset has K = 4"),
        ({"expert_ids": np.full((3, 4), 16)}, r"ids from 16 to 16; expected ids in \[0, 16\)"),
        ({"expert_ids": np.full((3, 4), -1)}, "ids from -1 to -1"),
        ({"expert_ids": np.array([["a"] * 4], object)}, "cannot be read"),
    ],
)
def test_malformed_trace_names_the_field(tmp_path, fields, message):
    path = tmp_path / "trace.npz"
    np.savez(path, **fields)
    with pytest.raises(ValueError, match=message):
        read_trace_ids(str(path), SHAPES)


@pytest.mark.parametrize("content", [None, b"", b"no archive", "array"])
def test_missing_or_broken_trace_file(tmp_path, content):
    path = tmp_path / "trace.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros((3, 4), int))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="routing trace:"):
        read_trace_ids(str(path), SHAPES)


SMALL = ExpertShapes(E=8, K=2, H=128, I=64)
ONE_EXPERT = 3 * 128 * 64 * 2


def _routing(ids):
    ids = np.array(ids, np.int32)
    return DrawnRouting(ids, np.ones(ids.shape, np.float32))


def test_counts_by_hand():
    routings = [_routing([[0, 1], [1, 2]]), _routing([[5, 5], [5, 5]])]
    found = bench.traffic(routings, SMALL)
    assert found.unique_experts == (3 + 1) / 2
    assert found.unique_bytes == 2 * ONE_EXPERT
    assert found.requested_bytes == 4 * ONE_EXPERT


def test_padding_reads_nothing():
    found = bench.traffic([_routing([[-1, 8], [3, 100]])], SMALL)
    assert (found.unique_experts, found.requested_bytes) == (1, ONE_EXPERT)


def test_presets_have_the_published_sizes():
    assert bench.expert_bytes(PRESETS["qwen3_30b_a3b"]) == 9_437_184
    layer = PRESETS["qwen3_coder_480b"]
    assert layer.E * bench.expert_bytes(layer) == 15_099_494_400
    # A byte a value, and 3 x 16 x 6 scales of 4.
    fp8 = dataclasses.replace(PRESETS["qwen3_30b_a3b"], weights="fp8")
    assert bench.expert_bytes(fp8) == 4_718_592 + 1152


def test_uniform_routing_meets_its_expectation():
    shapes = PRESETS["qwen3_30b_a3b"]
    assert bench.expected_unique_experts(shapes, 2) == pytest.approx(15.5)
    for T in (1, 4, 64):
        found = bench.traffic(make_routings("uniform", shapes, T, 40, 0), shapes)
        expected = bench.expected_unique_experts(shapes, T)
        assert found.unique_experts == pytest.approx(expected, rel=0.03)


def test_floor():
    assert bench.floor_us(3e6, 3.0) == pytest.approx(1.0)


def test_bytes_before_an_expert_is_read_again():
    a, b = _routing([[0, 0]]), _routing([[1, 1]])
    # Layers 0 1 0 1: expert 0 of layer 0 comes back after one other expert.
    assert bench.bytes_before_reuse([a, a, a, a], 2, SMALL) == ONE_EXPERT
    # With a new expert in the second round it takes a whole cycle.
    assert bench.bytes_before_reuse([a, a, b, b], 2, SMALL) == 3 * ONE_EXPERT


def test_a_shard_sees_other_shards_experts_as_padding():
    routing = _routing([[0, 5], [3, 4]])
    [shard] = bench.of_first_shard([routing], 4)
    np.testing.assert_array_equal(shard.expert_ids, [[0, -1], [3, -1]])
    assert shard.expert_ids.dtype == np.int32
    np.testing.assert_array_equal(shard.expert_weights, routing.expert_weights)
