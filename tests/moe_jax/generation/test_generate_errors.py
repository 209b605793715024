"""Each wrong argument raises before anything runs; NaN raises when it comes up."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generation import Sampling, generate, stream
from moe_jax.generation.arguments import padded_length
from moe_jax.rope import RopeConfig
from moe_jax.tokenization import ByteTokenizer
from tests.moe_jax.generation.models import DRAWN, PROMPTS, spoilt, tiny

ERRORS = {
    "no prompts": ({"prompts": []}, ValueError, r"prompts is \[\]; expected at least one row"),
    "text": ({"prompts": "hello"}, TypeError, "prompts is 'hello'; expected .* token ids"),
    "prompts a number": ({"prompts": 5}, TypeError, "prompts is 5; expected at least one row"),
    "prompts None": ({"prompts": None}, TypeError, "prompts is None; expected at least one row"),
    "row None": ({"prompts": [None]}, TypeError, r"prompts\[0\] is None; expected a sequence"),
    "row nested": ({"prompts": [[[1]]]}, TypeError, r"prompts\[0\]\[0\] is \[1\]; expected a w"),
    "id True": ({"prompts": [[True]]}, TypeError, r"prompts\[0\]\[0\] is True; expected a whole"),
    "model": ({"model": 5}, TypeError, "model is 5; expected a Qwen3Moe"),
    "row of text": ({"prompts": ["hello"]}, TypeError, r"prompts\[0\] is 'hello'; expected"),
    "one row, unnested": ({"prompts": [1, 2]}, TypeError, r"prompts\[0\] is 1; expected a seq"),
    "empty prompt": ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] is empty; expected"),
    "id too high": (
        {"prompts": [[1], [1, 128]]},
        ValueError,
        r"prompts\[1\]\[1\] is 128; expected 0 to 127, as vocab_size is 128",
    ),
    "id negative": ({"prompts": [[-1]]}, ValueError, r"prompts\[0\]\[0\] is -1; expected 0 to"),
    "id 64 bits": ({"prompts": [[2**32]]}, ValueError, r"\[0\] is 4294967296; expected 0 to 127"),
    "id 65 bits": ({"prompts": [[2**64]]}, ValueError, r"\[0\] is 18446744073709551616; expected"),
    "id in an array": (
        {"prompts": [np.array([1, 128])]},
        ValueError,
        r"prompts\[0\]\[1\] is 128; expected 0 to 127",
    ),
    "id a float": ({"prompts": [[1.0]]}, TypeError, r"prompts\[0\]\[0\] is 1.0; expected a whole"),
    "nothing new": ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; expected a whole"),
    "too long": (
        {"max_new_tokens": 1010},
        ValueError,
        r"prompts\[1\] has 15 tokens and max_new_tokens is 1010; expected .* = 1024 together",
    ),
    "capacity": (
        {"capacity": 22},
        ValueError,
        "capacity is 22; expected at least 23: the longest prompt has 15",
    ),
    "capacity a float": ({"capacity": 64.0}, ValueError, "capacity is 64.0; expected a whole"),
    "chunk": ({"prefill_chunk": 0}, ValueError, "prefill_chunk is 0; expected a whole number"),
    "steps 0": ({"steps_per_dispatch": 0}, ValueError, "steps_per_dispatch is 0; expected a whole"),
    "steps True": (
        {"steps_per_dispatch": True},
        ValueError,
        "steps_per_dispatch is True; expected",
    ),
    "logprobs": ({"logprobs": -1}, ValueError, "logprobs is -1; expected a whole number from 0 to"),
    "logprobs 129": (
        {"logprobs": 129},
        ValueError,
        "logprobs is 129; expected a whole number from 0 to 128, as vocab_size is 128",
    ),
    "logprobs True": ({"logprobs": True}, ValueError, "logprobs is True; expected a whole number"),
    "sampling": ({"sampling": 0.7}, TypeError, "sampling is 0.7; expected a Sampling"),
    "stop id": ({"stop_ids": [128]}, ValueError, r"stop_ids\[0\] is 128; expected 0 to 127"),
    "stop id text": ({"stop_ids": ["a"]}, TypeError, r"stop_ids\[0\] is .a.; expected a whole"),
    "stop ids alone": ({"stop_ids": 5}, TypeError, "stop_ids is 5; expected a sequence of tok"),
    "stop ids None": ({"stop_ids": None}, TypeError, "stop_ids is None; expected a sequence"),
    "stop strings None": (
        {"stop_strings": None},
        TypeError,
        "stop_strings is None; expected a seq",
    ),
    "stop strings 5": ({"stop_strings": 5}, TypeError, "stop_strings is 5; expected a sequence"),
    "tokenizer": ({"tokenizer": 3}, TypeError, "tokenizer is 3; expected an object with decode"),
    "on_routing": ({"on_routing": 3}, TypeError, "on_routing is 3; expected a function"),
    "platform": ({"platform": 3}, TypeError, "platform is 3; expected a name, or None"),
    "banned": (
        {"sampling": Sampling(suppress_tokens=[1, 128])},
        ValueError,
        r"suppress_tokens\[1\] is 128; expected 0 to 127, as vocab_size is 128",
    ),
    "stop string": ({"stop_strings": ["a"]}, ValueError, "stop_strings is .* without tokenizer"),
    "stop string empty": (
        {"stop_strings": [""], "tokenizer": ByteTokenizer(256)},
        ValueError,
        "stop_strings has an empty string",
    ),
    "seed": ({"seed": -1}, ValueError, "seed is -1; expected 0 to 4294967295"),
    "seeds": ({"seed": [1, 2]}, ValueError, "seed has 2 numbers; expected one, or one for each"),
    "seed None": ({"seed": None}, TypeError, "seed is None; expected 0 to 4294967295, or a seq"),
    "seed a float": ({"seed": 1.0}, TypeError, "seed is 1.0; expected 0 to 4294967295, or a seq"),
    "one seed": ({"seed": [1, None, 2]}, ValueError, r"seed\[1\] is None; expected 0 to 42949"),
    "backends": ({"decode_backend": ["grouped"]}, ValueError, r"decode_backend is \['grouped'\];"),
    "backend": (
        {"decode_backend": "cuda"},
        ValueError,
        r"decode_backend is 'cuda'; expected auto or one of \['grouped'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_arguments(name):
    changes, error, message = ERRORS[name]
    # `stream` itself raises, not its first event.
    with pytest.raises(error, match=message):
        stream(**{"model": tiny(), "prompts": PROMPTS, "max_new_tokens": 8} | changes)


def test_numbers_may_be_numpys_and_jaxs():
    numbers = {
        "max_new_tokens": np.int64(8),
        "prefill_chunk": np.int8(4),
        "capacity": jnp.int32(64),
        "stop_ids": np.array([1, 2]),
        "seed": np.array([1, 2, 3], np.uint32),
    }
    stream(tiny(), [np.array(prompt) for prompt in PROMPTS], **numbers)  # raises nothing
    stream(tiny(), jnp.ones((2, 3), jnp.int32), max_new_tokens=1, seed=jnp.uint32(5), stop_ids={1})


def test_capture_needs_experts_and_a_decode_step():
    dense = tiny(mlp_only_layers=(0,))
    with pytest.raises(ValueError, match="no MoE layer"):
        generate(dense, PROMPTS, max_new_tokens=8, capture=True)
    with pytest.raises(ValueError, match="no decode step"):
        generate(tiny(), PROMPTS, max_new_tokens=1, capture=True)
    with pytest.raises(ValueError, match="capture and on_routing are both given"):
        generate(tiny(), PROMPTS, max_new_tokens=8, capture=True, on_routing=print)


def test_rope_kinds_that_go_further_have_no_limit_of_positions():
    linear = tiny(rope=RopeConfig(kind="linear", factor=4.0), max_position_embeddings=16)
    stream(linear, PROMPTS, max_new_tokens=2)  # raises nothing
    stream(tiny(max_position_embeddings=16), PROMPTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_position_embeddings = 16 together"):
        stream(tiny(max_position_embeddings=16), PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_nan_is_an_error_that_names_the_row(sampling):
    model = spoilt(math.nan, token=ord("x"))
    with pytest.raises(FloatingPointError, match=r"row 2: the logits for its token 0 are NaN"):
        generate(model, [[1], [2], PROMPTS[2]], max_new_tokens=4, sampling=sampling)


def test_nan_that_comes_up_later():
    plain = generate(tiny(), PROMPTS, max_new_tokens=6).tokens[0]
    place = next(place for place in range(6) if plain[place] not in PROMPTS[0])
    model = spoilt(math.nan, token=plain[place])
    events = stream(model, [PROMPTS[0], [1], [2]], max_new_tokens=8)
    for _ in range(3 * (place + 1)):
        next(events)
    with pytest.raises(FloatingPointError, match=f"row 0: the logits for its token {place + 1} "):
        next(events)


def test_buckets():
    lengths = [1, 16, 17, 100, 512, 513, 1500]
    assert [padded_length(length, 512) for length in lengths] == (
        [16, 16, 32, 128, 512, 1024, 1536]
    )
    assert [padded_length(length, 24) for length in [1, 20, 24, 25]] == [16, 24, 24, 48]
    assert padded_length(3, 1) == 3
