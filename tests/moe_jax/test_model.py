"""The model against itself: caches, padding, chunks, backends, replay; and every wrong argument.

What it computes is checked against transformers in tests/moe_jax/parity.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.cache import init_cache
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.traces import trace_of
from tests.moe_jax.tiny import TINY, WINDOWED, B, S, close, model_of, random_ids, run


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
def test_cached_is_uncached(config):
    """The second chunk overwrites what its own first token still sees; parity has other chunks."""
    model, ids = model_of(config), random_ids()
    cache, logits, start = init_cache(config, B, S, jnp.float32), [], 0
    for size in (5, 5, 1):
        output = run(model, ids[:, start : start + size], cache)
        cache, start = output.cache, start + size
        logits.append(output.logits)
    close(jnp.concatenate(logits, axis=1), run(model, ids).logits)
    assert cache.lengths.tolist() == [S, S]


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(config, side):
    """A row with padding, alone or beside a longer one, cached or not, is the row without it."""
    model, ids, more = model_of(config), random_ids(), random_ids(5, (B, 1))
    places = {"left": [4, 5, 6, 7, 8, 9, 10], "right": list(range(7))}
    columns = np.array(places.get(side, [0, 1, 4, 5, 6, 9, 10]))
    short = ids[1, :7]
    padded = jnp.zeros(S, jnp.int32).at[columns].set(short)
    batch = jnp.stack([ids[0], padded])
    mask = jnp.stack([jnp.ones(S, jnp.int32), jnp.zeros(S, jnp.int32).at[columns].set(1)])
    # The first tokens of a row do not depend on those after them: one call for all lengths.
    unpadded = [jnp.concatenate([ids[0], more[0], ids[0, :1]]), jnp.tile(more[1], 13)]
    unpadded[1] = unpadded[1].at[:7].set(short)
    alone = run(model, jnp.stack(unpadded)).logits

    output = run(model, batch, None, mask)
    close(output.logits[0], alone[0, :11])
    close(output.logits[1, columns], alone[1, :7])

    output = run(model, batch, init_cache(config, B, 16, jnp.float32), mask)
    close(output.logits[1, columns], alone[1, :7])
    assert output.cache.lengths.tolist() == [11, 7]
    # Both rows go on, each from its own length; then the first stands still.
    step = run(model, more, output.cache, jnp.array([[1], [1]]))
    close(step.logits[:, 0], jnp.stack([alone[0, 11], alone[1, 7]]))
    still = run(model, more, step.cache, jnp.array([[0], [1]]))
    assert still.cache.lengths.tolist() == [12, 9]
    close(still.logits[1, 0], alone[1, 8])


def test_a_fully_padded_row_is_finite_and_routed_nowhere():
    mask = jnp.array([[1] * S, [0] * S])
    output = run(model_of(TINY), random_ids(), None, mask, extras=True)
    assert bool(jnp.all(jnp.isfinite(output.logits)))
    assert np.all(np.asarray(output.routings[0].ids)[S:] == -1)


def test_a_row_that_outgrows_its_cache_is_nan_and_the_others_are_not():
    ids, mask = random_ids(), jnp.array([[1] * S, [0] * (S - 3) + [1] * 3])
    output = run(model_of(TINY), ids, init_cache(TINY, B, 16, jnp.float32), mask)
    assert bool(jnp.all(jnp.isfinite(output.logits)))
    output = run(model_of(TINY), ids, output.cache, mask)  # 22 tokens and 6
    assert bool(jnp.all(jnp.isnan(output.logits[0])))
    assert bool(jnp.all(jnp.isfinite(output.logits[1])))


def test_a_window_smaller_than_the_cache_never_outgrows_it():
    cache, mask = init_cache(WINDOWED, B, 16, jnp.float32), jnp.ones((B, S), jnp.int32)
    for _ in range(2):
        output = run(model_of(WINDOWED), random_ids(), cache, mask)
        cache = output.cache
    assert bool(jnp.all(jnp.isfinite(output.logits)))


def test_decode_compiles_once_as_lengths_grow():
    @functools.partial(jax.jit, donate_argnames="cache")
    @chex.assert_max_traces(n=1)
    def step(state, ids, cache):
        output = nnx.merge(graphdef, state)(ids, cache=cache)
        return output.logits, output.cache

    chex.clear_trace_counter()
    graphdef, state = nnx.split(model_of(TINY))
    cache = init_cache(TINY, B, S, jnp.float32)
    for index in range(4):
        before = cache
        logits, cache = step(state, random_ids()[:, index : index + 1], cache)
    assert before.keys[0].is_deleted(), "the cache was not donated"
    close(logits[:, 0], run(model_of(TINY), random_ids()).logits[:, 3])


def test_logits_to_keep():
    model, ids = model_of(TINY), random_ids()
    whole = run(model, ids).logits
    chosen, each = jnp.array([0, 4]), jnp.array([[1, 2], [5, 0]])

    @jax.jit  # all at once, because the layers are the same
    def kept(model, chosen, each):
        return [model(ids, logits_to_keep=keep).logits for keep in (3, chosen, each)]

    expected = jnp.stack([whole[0, each[0]], whole[1, each[1]]])
    close(kept(model, chosen, each), [whole[:, -3:], whole[:, chosen], expected])


def test_moe_chunks_change_nothing():
    ids = random_ids()
    chunked = from_arrays(dataclasses.replace(TINY, moe_chunk_max_len=5), to_arrays(model_of(TINY)))
    close(run(chunked, ids).logits, run(model_of(TINY), ids).logits)


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_backends_agree(backend):
    model, ids = model_of(TINY), random_ids()
    close(run(model, ids, backend=backend).logits, run(model, ids).logits)


def test_the_kernels_agree_in_interpret_mode():
    if jax.default_backend() != "cpu":
        pytest.skip("interpret mode is for CPUs; experiments.generate compares backends on a GPU")
    one_layer = dataclasses.replace(TINY, num_hidden_layers=1)
    model, ids = model_of(one_layer, "bfloat16"), random_ids(shape=(1, 3))
    expected = run(model, ids, extras=True)
    replay = trace_of(expected.routings)
    found = run(model, ids, replay=replay, backend="pallas_interpret").logits
    error = jnp.linalg.norm((found - expected.logits).astype(jnp.float32))
    assert error < 0.02 * jnp.linalg.norm(expected.logits.astype(jnp.float32))


def test_a_captured_trace_replayed_gives_the_same_output():
    model, ids, mask = model_of(TINY), random_ids(), jnp.ones((B, S), jnp.int32).at[1, :4].set(0)
    first = run(model, ids, None, mask, extras=True)
    trace = trace_of(first.routings)
    chex.assert_shape(trace.expert_ids, (2, B * S, TINY.num_experts_per_tok))
    close(run(model, ids, None, mask, replay=trace).logits, first.logits)
    # Another trace is followed too: its experts are used, and not the router's own.
    other = dataclasses.replace(trace, expert_ids=(trace.expert_ids + 1) % TINY.num_experts)
    elsewhere = run(model, ids, None, mask, replay=other).logits
    assert float(jnp.max(jnp.abs(elsewhere[0] - first.logits[0]))) > 0.1


def test_losses_are_added_once():
    ids = random_ids()
    config = dataclasses.replace(TINY, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    model = from_arrays(config, to_arrays(model_of(TINY)))

    @jax.jit  # all at once, because the layers are the same
    def outputs(model):
        plain = model(ids, labels=ids)
        return plain, *(model(ids, labels=y, output_router_logits=True) for y in (ids, None))

    plain, routed, unlabelled = outputs(model)
    assert plain.aux_loss is None
    assert routed.aux_loss_per_layer.shape == (2,)
    expected = plain.loss + 0.5 * routed.aux_loss + 0.25 * routed.z_loss
    np.testing.assert_allclose(routed.loss, expected, rtol=1e-6)
    assert unlabelled.loss is None


def test_embeddings_instead_of_ids():
    model, ids = model_of(TINY), random_ids()
    embeds = to_arrays(model)["embed_tokens.weight"][ids]
    of_embeds = jax.jit(lambda model, embeds: model(inputs_embeds=embeds).logits)
    close(of_embeds(model, embeds), run(model, ids).logits)


@pytest.mark.parametrize("wrong", [TINY.vocab_size, -1])
def test_an_id_out_of_range_inside_a_compiled_function_makes_its_row_nan(wrong):
    logits = run(model_of(TINY), random_ids().at[1, 3].set(wrong)).logits
    assert bool(jnp.all(jnp.isfinite(logits[0])))
    assert bool(jnp.all(jnp.isnan(logits[1, 3:])))


WRONG = {
    "neither": ({}, "neither given; expected exactly one"),
    "both": ({"ids": True, "inputs_embeds": jnp.ones((B, S, 64))}, "both given"),
    "rank": ({"input_ids": jnp.zeros(S, int)}, r"input_ids has shape \(11,\); expected \[B, S\]"),
    "empty": ({"input_ids": jnp.zeros((B, 0), int)}, "B = 2 rows of S = 0"),
    "float ids": ({"input_ids": jnp.zeros((B, S))}, "input_ids has dtype float32"),
    "large id": ({"input_ids": jnp.array([[1, 512]])}, r"input_ids\[0, 1\] is 512; .*\[0, 512\)"),
    "negative id": ({"input_ids": jnp.array([[-1]])}, r"input_ids\[0, 0\] is -1"),
    "embeds": ({"inputs_embeds": jnp.ones((B, S, 65))}, r"\(2, 11, 65\); expected \[B, S, H = 64"),
    "mask": ({"ids": True, "attention_mask": jnp.ones((B, S + 1))}, r"attention_mask .* \(2, 12\)"),
    "positions": (
        {"ids": True, "position_ids": jnp.ones((1, B, S), int)},
        r"position_ids .*\(1, 2",
    ),
    "float positions": ({"ids": True, "position_ids": jnp.ones((1, S))}, "position_ids has dtype"),
    "segments": ({"ids": True, "segment_ids": jnp.ones((1, S), int)}, r"segment_ids has .*\(1, 11"),
    "segments and cache": (
        {"ids": True, "segment_ids": jnp.ones((B, S), int), "cache": init_cache(TINY, B, 4)},
        "segment_ids and cache are both given",
    ),
    "labels": ({"ids": True, "labels": jnp.zeros((B, 3), int)}, r"labels has shape \(2, 3\)"),
    "label": ({"ids": True, "labels": jnp.full((B, S), -1)}, r"labels\[0, 0\] is -1; .* or -100"),
    "keep": ({"ids": True, "logits_to_keep": 12}, "logits_to_keep is 12; expected 0 to S = 11"),
    "keep NumPy's": (
        {"ids": True, "logits_to_keep": np.int64(12)},
        "logits_to_keep is 12; expected 0",
    ),
    "keep where": (
        {"ids": True, "logits_to_keep": jnp.array([0, 11])},
        r"logits_to_keep has 0 to 11; expected indices in \[-11, 11\)",
    ),
    "keep 3-D": ({"ids": True, "logits_to_keep": jnp.zeros((1, 1, 1), int)}, "logits_to_keep has"),
    "loss of some": (
        {"ids": True, "labels": jnp.zeros((B, S), int), "logits_to_keep": 1},
        "the loss needs every position",
    ),
    "cache": ({"ids": True, "cache": init_cache(TINY, 3, 4)}, "2 layers and 3 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    arguments, message = dict(WRONG[name][0]), WRONG[name][1]
    if arguments.pop("ids", False):
        arguments["input_ids"] = random_ids()
    with pytest.raises(ValueError, match=message):
        model_of(TINY)(**arguments)


@pytest.mark.parametrize("op", ["experts", "attention"])
def test_a_backend_that_there_is_not_is_named(op):
    call = functools.partial(model_of(TINY), **{f"{op}_backend": "cuda"})
    with pytest.raises(ValueError, match="backend is 'cuda'; expected 'auto' or one of"):
        jax.eval_shape(call, random_ids())


LISTS = {
    "input_ids": (
        {"input_ids": [[1, 2]]},
        r"input_ids is \[\[1, 2\]\]; expected an array \[B, S\]",
    ),
    "mask": ({"attention_mask": [[1]]}, r"attention_mask is \[\[1\]\]; expected an array \[B, S\]"),
    "positions": ({"position_ids": [[1]]}, r"position_ids is \[\[1\]\]; expected an array"),
    "keep": ({"logits_to_keep": [1]}, r"logits_to_keep is \[1\]; expected an array \[N\]"),
    "cache": ({"cache": 5}, "cache is 5; expected a KVCache, or None"),
    "replay": ({"replay": [1]}, r"replay is \[1\]; expected a RoutingTrace, or None"),
}


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_array_is_named(name):
    arguments, message = LISTS[name]
    with pytest.raises(TypeError, match=message):
        model_of(TINY)(**{"input_ids": random_ids()} | arguments)


def test_a_trace_of_another_batch_is_refused():
    model, ids = model_of(TINY), random_ids()
    trace = trace_of(run(model, ids, None, jnp.ones((B, S), jnp.int32), extras=True).routings)
    with pytest.raises(ValueError, match=r"replay.expert_ids has shape .* = \(2, 11, 2\)"):
        model(ids[:1], replay=trace)
    for field, dtype in (("expert_ids", float), ("expert_weights", int)):
        wrong = dataclasses.replace(trace, **{field: getattr(trace, field).astype(dtype)})
        with pytest.raises(ValueError, match=f"replay.{field} has dtype {dtype.__name__}32"):
            model(ids, replay=wrong)
