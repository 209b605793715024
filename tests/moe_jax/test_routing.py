"""The router's functions, the statistics of what it did, and its traces."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.routings import read_trace_ids
from moe_jax.routing import replay_route, route, router_logits
from moe_jax.routing_stats import routing_statistics
from moe_jax.traces import (
    RoutingTrace,
    drop_padding,
    join_traces,
    load_trace,
    save_trace,
    trace_of,
)
from pallas_kernels.decode_experts import ExpertShapes


def random_logits(T, E, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(T, E)) * 2, jnp.float32)


@pytest.mark.parametrize("norm", [True, False])
def test_route_by_hand(norm):
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]], np.float32))
    routing = route(logits, 2, norm_topk_prob=norm)
    assert routing.ids.tolist() == [[1, 3], [0, 2]]
    weights = np.array([[0.4, 0.3], [0.7, 0.15]])
    if norm:
        weights /= weights.sum(1, keepdims=True)
    chex.assert_trees_all_close(routing.weights, weights.astype(np.float32), rtol=1e-6)
    chex.assert_trees_all_close(routing.probabilities, np.exp(logits), rtol=1e-6)


def test_the_lower_index_wins_a_tie():
    routing = route(jnp.array([[1.0, 5.0, 5.0, 5.0, 1.0]]), 2, norm_topk_prob=True)
    assert routing.ids.tolist() == [[1, 2]]


def test_padding_is_routed_nowhere_even_if_it_is_nan():
    logits = random_logits(3, 4).at[1].set(jnp.nan)
    routing = route(logits, 2, norm_topk_prob=True, valid=jnp.array([True, False, True]))
    assert routing.ids[1].tolist() == [-1, -1]
    assert routing.weights[1].tolist() == [0, 0]
    assert bool(jnp.all(routing.ids[::2] >= 0))


@pytest.mark.parametrize("K", [0, 5])
def test_K_out_of_range(K):
    with pytest.raises(ValueError, match=f"K is {K}; expected 1 to E = 4"):
        route(random_logits(2, 4), K, norm_topk_prob=True)


def test_a_float32_router_tells_apart_what_a_model_dtype_router_does_not():
    # 1 and 1 + 2**-10 are one number in bfloat16; their products with x are not, in float32.
    x = jnp.ones((1, 2), jnp.bfloat16)
    gate = jnp.array([[1.0, 0.0], [1.0, 2**-10]], jnp.bfloat16)
    exact = router_logits(x, gate)
    assert exact.dtype == jnp.float32
    assert route(exact, 1, norm_topk_prob=True).ids.tolist() == [[1]]
    rounded = router_logits(x, gate, dtype="model")
    assert route(rounded, 1, norm_topk_prob=True).ids.tolist() == [[0]]


def test_replay_of_what_was_routed_is_the_same_routing():
    logits = random_logits(6, 8)
    valid = jnp.arange(6) != 2
    for norm in (True, False):
        first = route(logits, 3, norm_topk_prob=norm, valid=valid)
        again = replay_route(logits, first.ids, None, norm_topk_prob=norm, valid=valid)
        chex.assert_trees_all_close(again, first)
        exactly = replay_route(logits, first.ids, first.weights, norm_topk_prob=norm)
        chex.assert_trees_all_equal(exactly, first)


@functools.partial(jax.jit, static_argnums=2)
def routed_and_counted(logits, valid, K):
    routing = route(logits, K, norm_topk_prob=True, valid=valid)
    return routing, routing_statistics(routing)


@pytest.mark.parametrize(("K", "padded"), [(1, 0), (3, 5), (3, 11), (3, 12), (9, 1)])
def test_statistics_count_what_numpy_counts(K, padded):
    T, E, seed = 12, 9, K
    valid = np.arange(T) >= padded

    routing, found = routed_and_counted(random_logits(T, E, seed), valid, K)
    load = np.bincount(np.asarray(routing.ids)[valid].ravel(), minlength=E)
    assert found.load.tolist() == load.tolist()
    assert load.sum() == K * valid.sum()
    assert int(found.unique_experts) == (load > 0).sum()
    assert int(found.dead_experts) == (load == 0).sum()
    if valid.any():
        np.testing.assert_allclose(found.imbalance, load.max() / load.mean(), rtol=1e-5)
        p = np.asarray(routing.probabilities, np.float64)[valid]
        np.testing.assert_allclose(
            found.router_entropy, -(p * np.log(p)).sum(1).mean(), rtol=1e-4, atol=1e-6
        )
    else:
        assert [float(found.imbalance), float(found.router_entropy)] == [0, 0]


def test_statistics_of_an_even_and_of_a_one_sided_load():
    even = routing_statistics(route(jnp.eye(4) * 9, 1, norm_topk_prob=True))
    np.testing.assert_allclose([even.imbalance, even.load_entropy], [1, np.log(4)], rtol=1e-6)
    one = routing_statistics(route(jnp.eye(4)[:1].repeat(4, 0) * 9, 1, norm_topk_prob=True))
    np.testing.assert_allclose([one.imbalance, one.load_entropy], [4, 0], atol=1e-6)
    assert int(one.dead_experts) == 3


def two_layers(valid=None):
    return trace_of(
        [route(random_logits(5, 8, seed), 2, norm_topk_prob=True, valid=valid) for seed in (0, 1)]
    )


def test_a_trace_is_stored_and_read(tmp_path):
    trace = two_layers()
    save_trace(tmp_path / "trace.npz", trace)
    chex.assert_trees_all_equal(load_trace(tmp_path / "trace.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_compare_layouts_reads_the_same_file(tmp_path):
    valid = jnp.array([True, False, True, True, False])
    trace = drop_padding(two_layers(valid))
    save_trace(tmp_path / "trace.npz", trace)
    ids = read_trace_ids(str(tmp_path / "trace.npz"), ExpertShapes(E=8, K=2, H=64, I=64))
    assert ids.tolist() == trace.expert_ids.tolist()
    assert ids.shape == (2, 3, 2)


def test_joined_traces():
    trace = two_layers()
    joined = join_traces([trace, trace])
    assert joined.expert_ids.shape == (2, 10, 2)
    chex.assert_trees_all_equal(joined.layer(1).expert_ids[5:], trace.layer(1).expert_ids)
    with pytest.raises(ValueError, match="None"):
        join_traces([trace, RoutingTrace(expert_ids=trace.expert_ids)])


def test_traces_that_cannot_be_read(tmp_path):
    path = tmp_path / "trace.npz"
    with pytest.raises(FileNotFoundError):
        load_trace(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"trace\.npz is no \.npz file"):
        load_trace(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(ValueError, match="expert_ids"):
        load_trace(path.with_suffix(".npy"))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="expert_ids"):
        load_trace(path)
    np.savez(path, expert_ids=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\) and dtype float64"):
        load_trace(path)
    np.savez(path, expert_ids=np.zeros((2, 3, 1), np.int32), expert_weights=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"expert_weights has shape \(2, 3\)"):
        load_trace(path)
    ids = np.zeros((2, 3, 1), np.int32)
    np.savez(path, expert_ids=ids, expert_weights=ids)
    with pytest.raises(ValueError, match="expert_weights has dtype int32"):
        load_trace(path)


def test_ids_beyond_int32_are_padding_in_a_file_too(tmp_path):
    ids = np.array([[[3, 2**32 + 1, -(2**40)]]])
    for name in ("written", "read"):
        path = tmp_path / f"{name}.npz"
        if name == "written":
            save_trace(path, RoutingTrace(expert_ids=ids))
        else:
            np.savez(path, expert_ids=ids)
        assert load_trace(path).expert_ids.tolist() == [[[3, 2**31 - 1, -1]]]


def test_a_save_that_fails_leaves_the_trace_before(tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    save_trace(path, two_layers())
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_trace(path, two_layers())
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["trace.npz"]
