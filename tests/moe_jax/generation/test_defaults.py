"""generation_config.json: stop ids and sampling, with transformers' defaults for what is absent."""

import json

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


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; expected a token id or a list"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is .*; expected a token id"),
        ({"do_sample": 1}, "do_sample is 1; expected true or false"),
        ({"do_sample": True, "top_p": 2}, "top_p is 2; expected 0 to 1"),
        ([], "holds a list; expected an object"),
    ],
)
def test_errors_name_the_file(tmp_path, file, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, file)
    assert str(tmp_path / "generation_config.json") in str(raised.value)
