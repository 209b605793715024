"""What is wrong with a directory is said at once, all of it, by key, file, found and expected."""

import json
import re

import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, load_hugging_face
from tests.moe_jax.checkpoints import hub
from tests.moe_jax.checkpoints.hub import HTML, LFS

NORM = "model.norm.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def config():
    return hub.config()


@pytest.fixture
def tensors(config):
    return hub.tensors(config)


def error_of(directory, **kwargs) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(directory, **kwargs)
    return caught.value


def kinds(error: CheckpointError) -> list[str]:
    return [kind for kind, _ in error.problems]


def test_missing_tensor(tmp_path, config, tensors):
    del tensors[EXPERT]
    error = error_of(hub.write(tmp_path, config, tensors))
    assert error.problems == (("missing", f"{EXPERT}; expected [8, 16]"),)
    assert f"{tmp_path} does not fit its config.json: 1 problem (1 missing)" in str(error)


def test_unexpected_tensor(tmp_path, config, tensors):
    tensors["model.layers.0.mlp.shared_expert.up_proj.weight"] = np.ones((2, 3), np.float32)
    error = error_of(hub.write(tmp_path, config, tensors))
    expected = "model.layers.0.mlp.shared_expert.up_proj.weight [2, 3] in model.safetensors"
    assert error.problems == (("unexpected", expected),)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16, 1), (8,)])
def test_shape(tmp_path, config, tensors, shape):
    tensors[EXPERT] = np.ones(shape, hub.BF16)
    error = error_of(hub.write(tmp_path, config, tensors))
    found = f"{EXPERT} in model.safetensors is {list(shape)}; expected [8, 16]"
    assert error.problems == (("shape", found),)


@pytest.mark.parametrize(
    ("dtype", "spelt"),
    [(np.float64, "F64"), (np.int8, "I8"), (np.uint32, "U32"), (hub.FP8, "F8_E4M3")],
)
def test_dtype(tmp_path, config, tensors, dtype, spelt):
    tensors[NORM] = np.ones(16, np.float32).astype(dtype)
    error = error_of(hub.write(tmp_path, config, tensors))
    found = f"{NORM} in model.safetensors is {spelt}; expected bfloat16, float32, float16"
    assert error.problems == (("dtype", found),)


def test_experts_of_one_array_must_agree_on_a_dtype(tmp_path, config, tensors):
    tensors[EXPERT] = tensors[EXPERT].astype(np.float32)
    error = error_of(hub.write(tmp_path, config, tensors))
    found = (
        "the tensors of layers.2.mlp.experts.gate_up are bfloat16, float32; expected one dtype, or "
        "dtype= to convert to"
    )
    assert error.problems == (("dtype", found),)


def test_all_problems_are_in_one_error(tmp_path, config, tensors):
    del tensors[NORM]
    tensors["lm_head.bias"] = np.ones(32, hub.BF16)
    tensors[EXPERT] = np.ones((16, 8), hub.BF16)
    tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.int16)
    error = error_of(hub.write(tmp_path, config, tensors, files=2))
    assert sorted(kinds(error)) == ["dtype", "missing", "shape", "unexpected"]
    for _, line in error.problems:
        assert line in str(error)


def test_a_long_list_is_cut_off_but_no_kind_is_hidden(tmp_path, config, tensors):
    for key in [key for key in tensors if ".experts." in key]:
        del tensors[key]
    tensors["lm_head.bias"] = np.ones(32, hub.BF16)
    error = error_of(hub.write(tmp_path, config, tensors))
    text = str(error)
    assert len(error.problems) == 25
    assert "25 problems (24 missing, 1 unexpected)" in text
    assert text.count("  missing: model.layers.") == 8
    assert "  missing: ... and 16 more" in text
    assert "  unexpected: lm_head.bias" in text


def test_one_line_where_the_config_is_of_another_size(tmp_path, config, tensors):
    """And no loop over layers or experts that no file has."""
    hub.write(tmp_path, config | {"num_hidden_layers": 10**9}, tensors)
    line = "all layers from 3 on; num_hidden_layers is 1000000000, and the files hold layers 0 to 2"
    assert error_of(tmp_path).problems == (("missing", line),)
    hub.write(tmp_path, config | {"num_experts": 10**9}, tensors)
    line = (
        "num_experts is 1000000000; the files have 4 in 2 layers, as model.layers.0.mlp.gate.weight"
        " in model.safetensors is [4, 16]"
    )
    assert error_of(tmp_path).problems == (("experts", line),)


@pytest.mark.parametrize("prefix", ["module.", "model.language_", None])
def test_keys_of_another_kind(tmp_path, config, tensors, prefix):
    renamed = {f"{prefix}{key}": array for key, array in tensors.items() if prefix}
    ((kind, line),) = error_of(hub.write(tmp_path, config, renamed)).problems
    example = f", '{prefix}model.layers.0.input_layernorm.weight' for example" if prefix else ""
    expected = "; expected keys such as 'model.layers.0.input_layernorm.weight'"
    assert (kind, line) == ("keys", f"the files have {len(renamed)} tensors{example}{expected}")


@pytest.mark.parametrize("content", [LFS, HTML], ids=["git-lfs", "html"])
def test_what_lies_in_place_of_a_file_is_named(tmp_path, config, tensors, content):
    named = "is a git-lfs pointer" if content == LFS else "is an HTML or XML page"
    (tmp_path / "one").mkdir()
    hub.write(tmp_path / "one", config, tensors)
    hub.write(tmp_path / "two", config, tensors, files=2)
    for file in ("one/model.safetensors", "one/config.json", "two/model.safetensors.index.json"):
        (tmp_path / file).write_text(content)
        message = str(error_of((tmp_path / file).parent))
        assert f"{tmp_path / file} {named}" in message
        assert "\n" not in message
    hub.write(tmp_path / "two", config, tensors, files=2)
    (tmp_path / "two" / "model-00001-of-00002.safetensors").write_text(content)
    ((kind, line),) = error_of(tmp_path / "two").problems
    assert kind == "damaged file"
    assert line.startswith(f"model-00001-of-00002.safetensors {named}")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_cut_off_file(tmp_path, config, tensors, kept):
    path = hub.write(tmp_path, config, tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    size = path.stat().st_size
    message = rf"model\.safetensors is damaged or cut off, at {size} bytes"
    assert re.search(message, str(error_of(tmp_path)))


def test_damaged_and_missing_files_beside_a_whole_one(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors, files=4)
    damaged = tmp_path / "model-00002-of-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    error = error_of(tmp_path)
    assert kinds(error) == ["damaged file", "missing file"]
    assert "model-00002-of-00004.safetensors is damaged or cut off" in error.problems[0][1]
    expected = sum(n % 4 == 2 for n in range(len(tensors)))
    missing = f"model-00003-of-00004.safetensors, with {expected} tensors of the index"
    assert error.problems[1][1] == missing


def test_index_that_names_what_is_not_there(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors, files=2)
    weight_map = hub.read_index(tmp_path)
    file = weight_map.pop(NORM)
    other = next(name for name in weight_map.values() if name != file)
    hub.write_index(tmp_path, weight_map | {NORM: other})
    error = error_of(tmp_path)
    assert sorted(line for _, line in error.problems) == sorted(
        [
            f"{NORM} is in {file}; the index says {other}",
            f"{NORM} is not in {other}, where the index says it is",
        ]
    )
    assert kinds(error) == ["index", "index"]


def test_index_that_leaves_out_what_is_there(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors, files=2)
    weight_map = hub.read_index(tmp_path)
    file = weight_map.pop(NORM)
    hub.write_index(tmp_path, weight_map)
    error = error_of(tmp_path)
    assert error.problems == (("index", f"{NORM} is in {file}; the index does not name it"),)


def test_index_with_a_tensor_that_is_in_no_file(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors, files=2)
    file = "model-00001-of-00002.safetensors"
    hub.write_index(tmp_path, hub.read_index(tmp_path) | {"model.ghost": file})
    error = error_of(tmp_path)
    found = f"model.ghost is not in {file}, where the index says it is"
    assert error.problems == (("index", found),)


def test_tensor_that_only_the_index_has_is_reported_once(tmp_path, config, tensors):
    kept = {key: value for key, value in tensors.items() if key != NORM}
    hub.write(tmp_path, config, kept, files=2)
    file = "model-00002-of-00002.safetensors"
    hub.write_index(tmp_path, hub.read_index(tmp_path) | {NORM: file})
    error = error_of(tmp_path)
    assert error.problems == (("index", f"{NORM} is not in {file}, where the index says it is"),)


def test_tensor_in_two_files(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors, files=2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    second = "model-00002-of-00002.safetensors"
    here = {key: tensors[key] for key, file in hub.read_index(tmp_path).items() if file == second}
    key = next(key for key in tensors if key not in here)
    hub.save_file(here | {key: tensors[key]}, tmp_path / second)
    error = error_of(tmp_path)
    assert error.problems == (("duplicate", f"{key} in {first.name} and in {second}"),)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "b\\u0000"}}',
        '{"weight_map": {"a": "\\ud800"}}',
        "[" * 100_000,
    ],
    ids=range(13),
)
def test_malformed_index(tmp_path, config, tensors, text):
    hub.write(tmp_path, config, tensors, files=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    message = str(error_of(tmp_path))
    assert "model.safetensors.index.json" in message
    assert "expected an object whose weight_map maps tensors to files beside it" in message


def test_single_file_and_index_together(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors)
    hub.write(tmp_path, config, tensors, files=2)
    assert "both model.safetensors and model.safetensors.index.json" in str(error_of(tmp_path))


def test_no_weights(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "neither model.safetensors nor model.safetensors.index.json" in str(error_of(tmp_path))


def test_no_directory_and_no_config(tmp_path, config, tensors):
    assert "nowhere is no directory" in str(error_of(tmp_path / "nowhere"))
    hub.write(tmp_path, config, tensors)
    assert "model.safetensors is no directory" in str(error_of(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in str(error_of(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected a mapping"),
        ('{"a": ' * 10_000, "config.json is nested too deep"),
        ('{"model_type": "qwen3"}', "model_type is 'qwen3'; expected 'qwen3_moe'"),
        ('{"model_type": "qwen3_moe", "hidden_size": 0}', "hidden_size is 0; expected"),
        (b"\xff\xfe{", "config.json is not valid JSON: 'utf-8'"),
    ],
)
def test_malformed_config(tmp_path, config, tensors, text, message):
    hub.write(tmp_path, config, tensors)
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    assert message in str(error_of(tmp_path))


@pytest.mark.parametrize("change", ["bits", "shape", "dtype"])
def test_head_of_a_tied_model_that_differs(tmp_path, change):
    config = hub.config(tie_word_embeddings=True)
    tensors = hub.tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.copy()
    if change == "bits":
        head[-1, -1] += 1
    head = {"bits": head, "shape": head[:-1], "dtype": head.astype(np.float32)}[change]
    error = error_of(hub.write(tmp_path, config, tensors | {"lm_head.weight": head}))
    assert kinds(error) == ["unexpected"]
    assert "lm_head.weight in model.safetensors differs from model.embed_tokens" in str(error)


def test_head_of_an_untied_model_is_needed(tmp_path, config, tensors):
    del tensors["lm_head.weight"]
    error = error_of(hub.write(tmp_path, config, tensors))
    found = "lm_head.weight; expected [32, 16]; tie_word_embeddings is false"
    assert error.problems == (("missing", found),)


@pytest.mark.parametrize("dtype", ["float64", "int8", np.float64, "bf17", float, hub.FP8])
def test_dtype_to_load_as(tmp_path, config, tensors, dtype):
    hub.write(tmp_path, config, tensors)
    message = str(error_of(tmp_path, dtype=dtype))
    assert "dtype is" in message
    assert "expected one of bfloat16, float32, float16" in message


def test_shardings_that_are_none(tmp_path, config, tensors):
    hub.write(tmp_path, config, tensors)
    with pytest.raises(TypeError, match=r"shardings\('embed_tokens.weight', \(32, 16\)\) is None"):
        load_hugging_face(tmp_path, shardings=lambda name, shape: None)
