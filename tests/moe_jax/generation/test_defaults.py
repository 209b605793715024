"""generation_config.json: stop ids and sampling, with transformers' defaults for what is absent."""

import json
import warnings

import pytest

from moe_jax.generation import GenerationDefaults, Sampling, read_generation_defaults


def read(folder, generation=None, config=None):
    for name, data in (("generation_config.json", generation), ("config.json", config)):
        if data is not None:
            (folder / name).write_text(json.dumps(data))
    return read_generation_defaults(folder)


def test_as_qwen3_has_it(tmp_path):
    file = {
        "bos_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }
    assert read(tmp_path, file, {"eos_token_id": 7}) == GenerationDefaults(
        sampling=Sampling(temperature=0.6, top_k=20, top_p=0.95), stop_ids=(151645, 151643)
    )


@pytest.mark.parametrize(
    ("file", "sampling"),
    [
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, Sampling()),
        ({"temperature": 0.6}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        (
            {"do_sample": True, "top_k": None, "min_p": 0.1},
            Sampling(temperature=1.0, top_k=50, min_p=0.1),
        ),
        ({"repetition_penalty": 1.05}, Sampling(repetition_penalty=1.05)),
        (
            {"do_sample": True, "top_k": 0, "temperature": 1, "repetition_penalty": 1.1},
            Sampling(temperature=1.0, repetition_penalty=1.1),
        ),
        (
            {"no_repeat_ngram_size": 3, "bad_words_ids": [[1], [2, 3]], "suppress_tokens": [4]},
            Sampling(no_repeat_ngram_size=3, bad_words_ids=[[1], [2, 3]], suppress_tokens=[4]),
        ),
        (
            {"no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": []},
            Sampling(),
        ),
    ],
)
def test_sampling(tmp_path, file, sampling):
    assert read(tmp_path, file).sampling == sampling


@pytest.mark.parametrize(
    ("generation", "config", "stop_ids"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, (5,)),
        ({"eos_token_id": [5, 6]}, None, (5, 6)),
        ({}, {"eos_token_id": 6}, (6,)),
        (None, {"eos_token_id": [6]}, (6,)),
        (None, {"eos_token_id": None}, ()),
        (None, None, ()),
    ],
)
def test_stop_ids(tmp_path, generation, config, stop_ids):
    assert read(tmp_path, generation, config).stop_ids == stop_ids


def test_arguments():
    with pytest.raises(TypeError, match="directory is 5; expected a path"):
        read_generation_defaults(5)
    with pytest.raises(TypeError, match=r"config is 5; expected what config.json holds"):
        read_generation_defaults("/nowhere", 5)


@pytest.mark.parametrize(
    ("value", "strings"),
    [(None, ()), ("END", ("END",)), (["END", "\n\n"], ("END", "\n\n")), ([], ())],
)
def test_stop_strings(tmp_path, value, strings):
    assert read(tmp_path, {"stop_strings": value}).stop_strings == strings


def test_what_is_not_applied_is_named_once(tmp_path):
    file = {"min_new_tokens": 5, "num_beams": 2, "typical_p": 0.5, "max_length": 2048}
    neutral = {"min_length": 0, "guidance_scale": 1, "penalty_alpha": None, "token_healing": False}
    with pytest.warns(UserWarning) as caught:
        read(tmp_path, file | neutral)
        read(tmp_path, file | neutral)
    path = tmp_path / "generation_config.json"
    assert [str(warning.message) for warning in caught] == [
        f"{path}: not applied here: min_new_tokens = 5, num_beams = 2"
    ]
    with pytest.warns(UserWarning, match=r"typical_p = 0\.5$"):  # without draws it changes nothing
        read(tmp_path, file | neutral | {"do_sample": True})


def test_transformers_defaults_warn_of_nothing(tmp_path):
    # What its GenerationConfig writes where a checkpoint changes nothing, and what is off.
    file = {
        "do_sample": True,
        "encoder_no_repeat_ngram_size": 0,
        "encoder_repetition_penalty": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "remove_invalid_values": False,
        "typical_p": 1.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, file).sampling == Sampling(temperature=1.0, top_k=50)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"suppress_tokens": [-1]}, r"suppress_tokens\[0\] is -1; expected 0 or more"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5; expected a sequence of token ids"),
        ({"bad_words_ids": [5]}, r"bad_words_ids\[0\] is 5; expected a sequence of token ids"),
        ({"bad_words_ids": [[1], []]}, r"bad_words_ids\[1\] is empty; expected at least one"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5; expected a whole number"),
        ({"stop_strings": [""]}, r"stop_strings is \[''\]; expected a string or a list"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; expected a token id or a list"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is .*; expected a token id"),
        ({"do_sample": 0}, "do_sample is 0; expected true or false"),
        ({"do_sample": 1}, "do_sample is 1; expected true or false"),
        ({"do_sample": True, "top_p": 2}, "top_p is 2; expected 0 to 1"),
        ([], "holds a list; expected an object"),
    ],
)
def test_errors_name_the_file(tmp_path, file, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, file)
    assert str(tmp_path / "generation_config.json") in str(raised.value)
