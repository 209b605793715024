"""What is generated: equal to the plain loop, whatever the batch, the padding and the chunks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.dispatch import record_choices
from moe_jax.generation import collect, generate, stream, streaming
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.tokenization import ByteTokenizer
from tests.moe_jax.generation.models import DRAWN, PROMPTS, V, plain_greedy, plain_routings, tiny

# A donation that XLA cannot use would leave two caches in memory.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

BYTES = ByteTokenizer(256)
# Two layers, a dense one and one with experts; a window that the prompts outgrow.
WINDOW = {"num_hidden_layers": 2, "mlp_only_layers": (0,), "use_sliding_window": True}
WINDOW |= {"sliding_window": 8}


def test_greedy_is_the_plain_loop():
    made = generate(tiny(), PROMPTS, max_new_tokens=20)
    assert made.tokens == [plain_greedy(prompt, 20) for prompt in PROMPTS]
    assert made.finish_reasons == ["length"] * 3
    assert made.texts == [""] * 3
    assert made.logprobs is None


def test_a_window_and_chunks_longer_than_it_and_another_backend():
    options = {"prefill_chunk": 12, "capacity": 64, "prefill_backend": "reference"}
    made = generate(tiny(**WINDOW), PROMPTS, max_new_tokens=20, **options)
    assert made.tokens == [plain_greedy(prompt, 20, **WINDOW) for prompt in PROMPTS]


def test_a_row_alone_prefilled_token_by_token():
    made = generate(tiny(), PROMPTS[1:2], max_new_tokens=12, prefill_chunk=1)
    assert made.tokens == [plain_greedy(PROMPTS[1], 12)]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, options = tiny(), {"max_new_tokens": 12, "sampling": DRAWN}
    together = generate(model, PROMPTS, seed=[5, 6, 7], **options).tokens
    others = [[1] * 16, PROMPTS[0], [2]]  # in another place, with other padding
    assert generate(model, others, seed=[1, 5, 2], **options).tokens[1] == together[0]
    others = [PROMPTS[2], [1], [3] * 9]
    assert generate(model, others, seed=[7, 1, 5], **options).tokens[0] == together[2]
    # with one seed, a row's place in the batch is part of its key
    rows = generate(model, PROMPTS, seed=5, **options).tokens
    others = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    others = generate(model, others, seed=5, **options).tokens
    assert others[0] == rows[0] == together[0]
    assert others[2] != rows[1]


def test_seeds():
    model, options = tiny(), {"max_new_tokens": 12, "sampling": DRAWN}
    first = generate(model, PROMPTS, seed=1, **options).tokens
    assert generate(model, PROMPTS, seed=1, **options).tokens == first
    assert generate(model, PROMPTS, seed=2, **options).tokens != first
    same = generate(model, [PROMPTS[0]] * 3, seed=1, **options).tokens
    assert len(set(map(tuple, same))) == 3  # rows of one prompt are drawn apart
    generate(model, PROMPTS, seed=2**32 - 1, **options)


def test_repetition_penalty_counts_the_prompt_and_what_was_generated():
    strong = dataclasses.replace(DRAWN, repetition_penalty=100.0, temperature=1e-5)
    made = generate(tiny(), PROMPTS, max_new_tokens=20, sampling=strong)
    for tokens, before in zip(made.tokens, PROMPTS, strict=True):
        assert len(set(tokens)) == len(tokens)
        assert not set(tokens) & set(before)


def test_bans_count_the_prompt_and_what_was_generated():
    free = [plain_greedy(prompt, 3) for prompt in PROMPTS]
    words = [free[0][:1], [PROMPTS[1][-1], free[1][0]], [PROMPTS[2][-1], *free[2][:2]]]
    suppressed = [free[2][2], 5]

    def banned(row):
        bigrams = set(itertools.pairwise(row))
        return [
            token
            for token in range(V)
            if token in suppressed
            or (row[-1], token) in bigrams
            or any([*row, token][-len(word) :] == word for word in words)
        ]

    nearly_greedy = {"temperature": 1e-5, "repetition_penalty": 1.000001}
    bans = {"bad_words_ids": words, "suppress_tokens": suppressed}
    sampling = dataclasses.replace(DRAWN, **nearly_greedy, **bans)
    made = generate(tiny(), PROMPTS, max_new_tokens=20, sampling=sampling)
    assert made.tokens == [plain_greedy(prompt, 20, banned) for prompt in PROMPTS]


def test_stop_ids():
    plain = [plain_greedy(prompt, 20) for prompt in PROMPTS]
    stop = plain[0][4]
    made = generate(tiny(), PROMPTS, max_new_tokens=20, stop_ids=[stop, 127], tokenizer=BYTES)
    for tokens, text, reason, whole in zip(
        made.tokens, made.texts, made.finish_reasons, plain, strict=True
    ):
        ends = [place for place, token in enumerate(whole) if token in (stop, 127)]
        length = ends[0] + 1 if ends else 20
        assert tokens == whole[:length]
        assert reason == ("stop_id" if ends else "length")
        assert text == BYTES.decode(whole[: length - 1] if ends else whole)
    assert made.finish_reasons[0] == "stop_id"


def test_stop_id_as_first_and_as_last_token():
    plain = [plain_greedy(prompt, 20) for prompt in PROMPTS]
    first = [tokens[:1] for tokens in plain]
    made = generate(tiny(), PROMPTS, max_new_tokens=20, stop_ids=[ids[0] for ids in first])
    assert (made.tokens, made.finish_reasons) == (first, ["stop_id"] * 3)
    assert (made.decode_steps, made.tokens_per_second) == (0, None)
    row = plain[0]
    new = next(place for place in range(1, 20) if row[place] not in row[:place]) + 1
    made = generate(tiny(), PROMPTS, max_new_tokens=new, stop_ids=[row[new - 1]])
    assert (made.tokens[0], made.finish_reasons[0]) == (row[:new], "stop_id")


def test_stop_strings_end_their_row_only():
    plain = [plain_greedy(prompt, 20) for prompt in PROMPTS]
    text = BYTES.decode(plain[0])
    stop = text[5:8]
    made = generate(
        tiny(), PROMPTS, max_new_tokens=20, stop_strings=[stop, "never"], tokenizer=BYTES
    )
    shown = text[: text.index(stop)]
    assert made.texts[0] == shown
    assert made.tokens[0] == plain[0][: len(shown) + 3]
    assert made.finish_reasons[0] == "stop_string"
    for row in (1, 2):
        whole = BYTES.decode(plain[row])
        assert made.texts[row] == whole.partition(stop)[0]
        assert made.finish_reasons[row] == ("stop_string" if stop in whole else "length")
        assert made.tokens[row] == plain[row][: len(made.tokens[row])]


class WithSpecialToken(ByteTokenizer):
    """Bytes, one of which is a special token that `decode` skips."""

    def __init__(self, special):
        super().__init__(256)
        self.special = special

    def decode(self, ids):
        return super().decode([id_ for id_ in ids if id_ != self.special])

    def special_text(self, id_):
        return "<end>" if id_ == self.special else None


def test_a_stop_string_may_be_a_special_token():
    plain = plain_greedy(PROMPTS[0], 20)
    place = next(place for place in range(3, 20) if plain[place] not in plain[:place])
    tokenizer = WithSpecialToken(plain[place])
    made = generate(tiny(), PROMPTS, max_new_tokens=20, stop_strings=["<end>"], tokenizer=tokenizer)
    assert made.tokens[0] == plain[: place + 1]
    assert made.texts[0] == BYTES.decode(plain[:place])
    assert made.finish_reasons[0] == "stop_string"


def test_streaming_is_generating():
    model = tiny()
    options = {"max_new_tokens": 10, "sampling": DRAWN, "tokenizer": BYTES, "stop_ids": [3]}
    events = list(stream(model, PROMPTS, **options))
    made = generate(model, PROMPTS, **options)
    assert collect(events, 3).tokens == made.tokens
    for row in range(3):
        own = [event for event in events if event.row == row]
        assert [event.index for event in own] == list(range(len(own)))
        assert "".join(event.text for event in own) == made.texts[row]
        assert [event.finish_reason for event in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == made.finish_reasons[row]
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)
    assert made.decode_seconds > 0
    assert made.tokens_per_second == pytest.approx(
        (sum(map(len, made.tokens)) - 3) / made.decode_seconds
    )


def test_a_stream_comes_token_by_token():
    events = stream(tiny(), PROMPTS, max_new_tokens=20)
    first = next(events)
    assert (first.row, first.index) == (0, 0)
    assert first.token_id == plain_greedy(PROMPTS[0], 1)[0]
    events.close()


CAPTURED = {"capture": True, "decode_backend": "grouped"}


def test_captured_trace_is_what_the_model_routes():
    model = tiny()
    plain = [plain_greedy(prompt, 8) for prompt in PROMPTS]
    stop = plain[2][3]
    made = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop], **CAPTURED)
    ends = [row.index(stop) + 1 if stop in row else 8 for row in plain]
    assert made.tokens == [row[:end] for row, end in zip(plain, ends, strict=True)]
    steps = max(map(len, made.tokens)) - 1
    layers, K = 1, model.config.num_experts_per_tok
    assert made.trace.expert_ids.shape == (layers, steps * 3, K)
    ids = np.asarray(made.trace.expert_ids).reshape(layers, steps, 3, K)
    weights = np.asarray(made.trace.expert_weights).reshape(layers, steps, 3, K)
    for row, prompt in enumerate(PROMPTS):
        tokens = made.tokens[row]
        for layer, routing in enumerate(plain_routings(prompt + tokens)):
            ran = slice(len(prompt), len(prompt) + len(tokens) - 1)
            own = slice(0, len(tokens) - 1)
            np.testing.assert_array_equal(ids[layer, own, row], routing.ids[ran])
            np.testing.assert_allclose(weights[layer, own, row], routing.weights[ran], atol=1e-5)
        assert (ids[:, len(tokens) - 1 :, row] == -1).all()
        assert (weights[:, len(tokens) - 1 :, row] == 0).all()
    assert any(len(tokens) < steps + 1 for tokens in made.tokens)


def test_trace_has_nothing_of_a_row_after_its_stop_string():
    text = BYTES.decode(plain_greedy(PROMPTS[0], 20))
    options = {"stop_strings": [text[2]], "tokenizer": BYTES, **CAPTURED}
    made = generate(tiny(), PROMPTS, max_new_tokens=8, **options)
    ids = np.asarray(made.trace.expert_ids).reshape(1, -1, 3, 2)
    length = len(made.tokens[0])
    assert length <= 3 and ids.shape[1] > length
    assert (ids[:, : length - 1, 0] >= 0).all()
    assert (ids[:, length - 1 :, 0] == -1).all()


def test_prompts_may_be_numpy_arrays():
    prompts = [np.asarray(prompt, np.int64) for prompt in PROMPTS]
    made = generate(tiny(), prompts, max_new_tokens=3)
    assert made.tokens == [plain_greedy(prompt, 3) for prompt in PROMPTS]


def test_parameters_are_those_at_the_call():
    model = nnx.clone(tiny())
    expected = generate(model, PROMPTS, max_new_tokens=3).tokens
    events = stream(model, PROMPTS, max_new_tokens=3)
    model.embed_tokens.weight[...] = jnp.roll(model.embed_tokens.weight[...], 1, axis=0)
    assert collect(events, 3).tokens == expected
    again = from_arrays(model.config, to_arrays(model))
    changed = generate(model, PROMPTS, max_new_tokens=3).tokens
    assert changed == generate(again, PROMPTS, max_new_tokens=3).tokens
    assert changed != expected


def test_the_cache_has_the_dtype_of_the_model(monkeypatch):
    real = streaming.compiled.begin

    def begin(*arguments):
        _, state = jax.eval_shape(functools.partial(real, *arguments))
        raise FloatingPointError(state.cache.keys[0].dtype)  # nothing more is to be compiled

    monkeypatch.setattr(streaming.compiled, "begin", begin)
    arrays = {name: array.astype(jnp.bfloat16) for name, array in to_arrays(tiny()).items()}
    for model in (from_arrays(tiny().config, arrays), tiny()):
        with pytest.raises(FloatingPointError, match=str(model.embed_tokens.weight.dtype)):
            generate(model, PROMPTS, max_new_tokens=1)
    assert model.embed_tokens.weight.dtype == jnp.float32


def test_on_cuda_prefill_says_what_it_knows_of_its_rows(monkeypatch):
    """Static facts of a chunk spare attention its mask; the tokens are the same."""
    prompts = [list(range(1, 33)), list(range(5, 30))]  # of 32 tokens, and of 25 behind padding
    options = {"max_new_tokens": 1, "prefill_chunk": 16, "prefill_backend": "reference"}
    with record_choices() as record:
        made = generate(tiny(), prompts, platform="cuda", **options)
    found = [(r.own_keys, r.unpadded) for r, _ in record if r.op == "attention"]
    assert list(dict.fromkeys(found)) == [(True, False), (False, False)]
    assert made.tokens == generate(tiny(), prompts, **options).tokens

    plans = []

    def prefill(plan, *arguments):
        plans.append((plan.empty_cache, plan.unpadded))
        return real(plan._replace(empty_cache=False, unpadded=False), *arguments)

    real = streaming.compiled.prefill
    monkeypatch.setattr(streaming.compiled, "prefill", prefill)
    for platform in ("cuda", "cpu"):
        generate(tiny(), prompts[:1] * 2, platform=platform, **options)
    assert plans == [(True, True), (False, False), (False, False), (False, False)]


@pytest.mark.parametrize(
    ("platform", "B", "columns"),
    [("cuda", 1, 4096), ("cuda", 3, 1024), ("cuda", 8, 512), ("cuda", 5000, 512), ("cpu", 1, 512)],
)
def test_a_chunks_columns(platform, B, columns):
    """As many tokens of all rows on CUDA, a power of two of columns, and 512 at least."""
    assert streaming._default_chunk(platform, B) == columns
