"""Each wrong argument raises before anything runs; NaN raises when it comes up."""

import math

import pytest

from moe_jax.generation import Sampling, generate, stream
from moe_jax.generation.arguments import padded_length
from moe_jax.rope import RopeConfig
from moe_jax.tokenization import ByteTokenizer
from tests.moe_jax.generation.models import DRAWN, PROMPTS, spoilt, tiny

ERRORS = {
    "no prompts": ({"prompts": []}, ValueError, r"prompts is \[\]; expected at least one row"),
    "text": ({"prompts": "hello"}, ValueError, "prompts is 'hello'; expected .* token ids"),
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
    "sampling": ({"sampling": 0.7}, TypeError, "sampling is 0.7; expected a Sampling"),
    "stop id": ({"stop_ids": [128]}, ValueError, r"stop_ids\[0\] is 128; expected 0 to 127"),
    "stop id text": ({"stop_ids": ["a"]}, TypeError, r"stop_ids\[0\] is .a.; expected a whole"),
    "stop string": ({"stop_strings": ["a"]}, ValueError, "stop_strings is .* without tokenizer"),
    "stop string empty": (
        {"stop_strings": [""], "tokenizer": ByteTokenizer(256)},
        ValueError,
        "stop_strings has an empty string",
    ),
    "seed": ({"seed": -1}, ValueError, "seed is -1; expected 0 to 4294967295"),
    "seeds": ({"seed": [1, 2]}, ValueError, "seed has 2 numbers; expected one, or one for each"),
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
        stream(tiny(), **{"prompts": PROMPTS, "max_new_tokens": 8} | changes)


def test_capture_needs_experts_and_a_decode_step():
    dense = tiny(mlp_only_layers=(0, 1))
    with pytest.raises(ValueError, match="no MoE layer"):
        generate(dense, PROMPTS, max_new_tokens=8, capture=True)
    with pytest.raises(ValueError, match="no decode step"):
        generate(tiny(), PROMPTS, max_new_tokens=1, capture=True)


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
