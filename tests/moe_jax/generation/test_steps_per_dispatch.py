"""Several decode steps a dispatch: the same events as with one, whatever ends a row and when."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import init_cache
from moe_jax.generation import collect, decode, stream
from moe_jax.generation.decode import Loop, loop_for
from moe_jax.generation.sampling import Sampling, row_keys, token_table
from moe_jax.parameters import parameter_shapes
from moe_jax.tokenization import ByteTokenizer
from tests.moe_jax.generation.models import PROMPTS, V, plain_logits, spoilt, tiny

# A donation that XLA cannot use would leave two caches in memory.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

BYTES = ByteTokenizer(256)
NEW = 20
# Draws, and both kinds of history; without what compiles for long and looks at one step alone.
DRAWN = Sampling(temperature=1.0, repetition_penalty=1.3, no_repeat_ngram_size=2)
OPTIONS = {"max_new_tokens": NEW, "sampling": DRAWN, "seed": 3, "logprobs": 3}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}  # which the rows outgrow
LOOPS = {"exits early": Loop(6, exits_early=True), "runs all": Loop(6)}


def events(loop, monkeypatch, model=None, **options):
    """The events with 0 for their times, each step's routing, and what each dispatch returned."""
    traces, made, real = [], [], decode.decode

    def spy(*arguments):
        made.append(real(*arguments))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(decode, "loop_for", lambda *_: loop)
        patch.setattr(decode, "decode", spy)
        options = OPTIONS | {"on_routing": traces.append} | options
        found = list(stream(model or tiny(**WINDOW), PROMPTS, **options))
    return [dataclasses.replace(event, seconds=0.0) for event in found], traces, made


@pytest.fixture(scope="module")
def made():
    """What is generated where nothing ends a row."""
    with pytest.MonkeyPatch.context() as patch:
        return collect(events(Loop(), patch)[0], 3)


@pytest.fixture(scope="module")
def plain(made):
    """Each row's tokens where nothing ends it."""
    return made.tokens


def steps_run(made) -> int:
    return sum(int(np.any(part.ran, axis=1).sum()) for part in made)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_events_are_those_of_single_steps(loop, plain, monkeypatch):
    others = plain[1] + plain[2]
    options = {
        "stop_ids": [next(token for token in plain[0][3:-6] if token not in others)],
        "stop_strings": [BYTES.decode(plain[1][4:6])],
        "tokenizer": BYTES,
    }
    expected, routings, _ = events(Loop(), monkeypatch, **options)
    found, traces, made = events(loop, monkeypatch, **options)
    assert found == expected
    reasons = [event.finish_reason for event in found if event.finish_reason]
    assert sorted(reasons) == ["length", "stop_id", "stop_string"]
    assert len(traces) == steps_run(made) == NEW - 1
    for trace, routing in zip(traces, routings, strict=True):
        np.testing.assert_array_equal(trace.expert_ids, routing.expert_ids)
        np.testing.assert_array_equal(trace.expert_weights, routing.expert_weights)
    # A row that its text ends runs on for a while, then stays as it is; others never run on.
    ran = np.concatenate([part.ran for part in made])
    assert ran[:, 0].sum() == sum(event.row == 0 for event in found) - 1
    assert not ran[-6:, 1].any()
    lengths = np.array([len(prompt) for prompt in PROMPTS]) + ran.sum(axis=0)
    np.testing.assert_array_equal(made[-1].state.cache.lengths, lengths)
    for part in made:
        assert (np.asarray(part.traces.expert_ids)[:, 0][~np.asarray(part.ran)] == -1).all()


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_device_stops_when_no_row_goes_on(loop, plain, monkeypatch):
    stops = [row[4] for row in plain]
    expected, _, _ = events(Loop(), monkeypatch, stop_ids=stops)
    found, _, made = events(loop, monkeypatch, stop_ids=stops)
    assert found == expected
    last = max(event.index for event in found)
    assert 0 < steps_run(made) == last < 6
    # The number of the last token that was sampled: the loop either left, or went on for nothing.
    assert made[-1].sampled.index == (last if loop.exits_early else 6 * len(made))


def test_log_probabilities_are_of_raw_logits(made):
    penalised = 0
    for prompt, tokens, found in zip(PROMPTS, made.tokens, made.logprobs, strict=True):
        for place, (token, each) in enumerate(zip(tokens, found, strict=True)):
            logits = plain_logits(prompt + tokens[:place], **WINDOW).astype(np.float64)
            expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            ids, values = zip(*each.top, strict=True)
            np.testing.assert_allclose(each.chosen, expected[token], atol=1e-4)
            np.testing.assert_allclose(values, np.sort(expected)[:-4:-1], atol=1e-4)
            np.testing.assert_allclose(values, expected[list(ids)], atol=1e-4)
            penalised += token in prompt + tokens[:place]
    assert penalised > 0  # else nothing tells them from what is drawn from


def test_one_compilation_serves_every_number_of_steps(monkeypatch):
    events(Loop(6), monkeypatch)
    before = decode.decode._cache_size()
    for new in (2, 7, 9):
        found, _, made = events(Loop(6), monkeypatch, max_new_tokens=new, seed=[1, 2, 3])
        assert steps_run(made) == new - 1 == found[-1].index
    assert decode.decode._cache_size() == before


def test_the_first_token_comes_while_one_dispatch_runs(monkeypatch):
    counts, real = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *a: counts.append(int(a[-1])) or real(*a))
    options = OPTIONS | {"on_routing": lambda trace: None, "steps_per_dispatch": 6}
    started = []
    for event in stream(tiny(**WINDOW), PROMPTS, **options):
        if event.row == 0:
            started.append(len(counts))
    # Tokens are read when the next dispatch has begun, and groups grow: 1, 2, 4, 6, the rest.
    assert counts == [1, 2, 4, 6, 6]
    assert started == [1, 2, 3, 3, *[4] * 4, *[5] * 12]


def test_nan_in_the_middle_of_a_dispatch(plain, monkeypatch):
    rows = [*PROMPTS, *plain[1:]]
    place = next(n for n in range(2, NEW) if not any(plain[0][n] in row for row in rows))
    model = spoilt(float("nan"), token=plain[0][place], **WINDOW)
    with pytest.raises(FloatingPointError, match=f"row 0: the logits for its token {place + 1} "):
        events(Loop(6), monkeypatch, model)


def test_counts():
    assert list(Loop(8, exits_early=True).counts(20)) == [1, 2, 4, 8, 5]
    assert list(Loop(8).counts(20)) == [8, 8, 4]
    assert list(Loop().counts(3)) == [1, 1, 1]
    assert list(Loop(8).counts(0)) == []


def test_where_there_are_loops():
    assert [loop_for(name, None, 64) for name in ("cpu", "cuda")] == [Loop(), Loop(8)]
    assert [loop_for(name, 4, 64) for name in ("cpu", "cuda")] == [Loop(4, True), Loop(4)]
    assert [loop_for(name, 4, 64) for name in ("ascend", "other")] == [Loop(), Loop()]
    assert loop_for("cpu", 10**9, 64) == Loop(64, True)  # no row has more steps in it


def lowered(loop, platform, B=3, capacity=64):
    """The decode function of greedy choices, from shapes alone."""
    config, sampling = tiny().config, Sampling()

    def inputs():
        rows = jnp.zeros(B, jnp.uint32)
        keys, history = row_keys(rows, rows), sampling.steps.empty_history(B, V, capacity)
        state = decode.DecodeState(init_cache(config, B, capacity, jnp.float32), history)
        last = decode.Sampled(jnp.zeros(B, jnp.int32), jnp.ones(B, bool), jnp.int32(0))
        return sampling.values(), keys, token_table([]), state, last, last.active, last.index

    values, keys, stop_ids, *rest = jax.eval_shape(inputs)
    parameters = parameter_shapes(config, jnp.float32)
    plan = decode.Plan(config, sampling.steps, "portable", platform, False, loop)
    step_inputs = decode.StepInputs(parameters, values, keys, stop_ids)
    return decode.decode.lower(plan, step_inputs, *rest), rest[0].cache


def test_without_loops_there_is_none():
    assert "while" not in lowered(loop_for("ascend", 8, 64), "ascend")[0].as_text()
    assert "while" in lowered(loop_for("cpu", 8, 64), "cpu")[0].as_text()


def test_the_cache_stays_in_place():
    found, cache = lowered(Loop(6), "cpu", capacity=320)
    compiled = found.compile()
    size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    shape = "f32[" + ",".join(map(str, cache.keys[0].shape)) + "]"
    text = compiled.as_text()
    assert shape in text
    assert not re.search(rf"= {re.escape(shape)}\S* copy\(", text)
