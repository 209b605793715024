"""A model becomes a Hugging Face directory: the hub's keys, every bit, files as asked."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import (
    CheckpointError,
    Reader,
    load_hugging_face,
    save_hugging_face,
    write_hugging_face,
)
from moe_jax.checkpoints.readers import host_copy, of_model
from moe_jax.parameters import from_arrays, to_arrays
from tests.moe_jax.checkpoints import hub


def model_of(tmp_path, config, tensors=None):
    return load_hugging_face(hub.write(tmp_path / "hub", config, tensors or hub.tensors(config)))


@pytest.mark.parametrize("dtype", [hub.BF16, np.float32, np.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"tie_word_embeddings": True}, {"mlp_only_layers": [0, 1, 2]}],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_round_trip_is_exact(tmp_path, changes, dtype):
    config = hub.config(**changes)
    tensors = hub.tensors(config, np.dtype(dtype))
    save_hugging_face(tmp_path / "saved", model_of(tmp_path, config, tensors))
    hub.expect_same(hub.read(tmp_path / "saved"), tensors)
    assert sorted(hub.bytes_of(tmp_path / "saved")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_config_says_what_it_said(tmp_path, spelling):
    config = hub.config()
    model = model_of(tmp_path, config)
    save_hugging_face(tmp_path / "saved", model, spelling=spelling)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    names = {"v4": ("num_experts", "torch_dtype"), "v5": ("num_local_experts", "dtype")}[spelling]
    assert {name: saved[name] for name in names} == {names[0]: 4, names[1]: "bfloat16"}
    assert saved["bos_token_id"] == 7
    assert saved["architectures"] == ["Qwen3MoeForCausalLM"]
    again = load_hugging_face(tmp_path / "saved").config
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(model.config, extra={})


@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_config_has_the_dtype_that_is_on_disk(tmp_path, spelling):
    config = hub.config(dtype="float16")  # beside torch_dtype bfloat16: both are out of date
    hub.write(tmp_path / "hub", config, hub.tensors(config))
    model = load_hugging_face(tmp_path / "hub", dtype="float32")
    save_hugging_face(tmp_path / "saved", model, spelling=spelling)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = {"v4": "torch_dtype", "v5": "dtype"}[spelling]
    assert {key: saved[key] for key in ("dtype", "torch_dtype") if key in saved} == {
        name: "float32"
    }


def test_quantisation_is_not_claimed_for_what_is_written(tmp_path):
    config = hub.config()
    model = model_of(tmp_path, config)
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["model"]}
    claimed = dataclasses.replace(model.config, quantization_config=settings)
    save_hugging_face(tmp_path / "saved", from_arrays(claimed, to_arrays(model)))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("max_shard_bytes", [1, 700, 3000, 10**9])
def test_files_of_at_most_so_many_bytes(tmp_path, max_shard_bytes):
    config = hub.config()
    tensors = hub.tensors(config)
    saved = tmp_path / "saved"
    save_hugging_face(saved, model_of(tmp_path, config, tensors), max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        assert not (saved / "model.safetensors.index.json").exists()
    else:
        count = len(files)
        assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        index = json.loads((saved / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert sorted(set(index["weight_map"].values())) == files
        for file in files:
            here = hub.load_file(saved / file)
            assert sorted(here) == sorted(k for k, f in index["weight_map"].items() if f == file)
            size = sum(tensor.nbytes for tensor in here.values())
            assert size <= max_shard_bytes or len(here) == 1
        assert count == (len(tensors) if max_shard_bytes == 1 else count)
    hub.expect_same(hub.read(saved), tensors)
    load_hugging_face(saved)


def test_mixed_dtypes_stay_aligned(tmp_path):
    """An odd number of bfloat16 before a float32 would put it at no multiple of 4."""
    config = hub.config(hidden_size=15, vocab_size=31)
    tensors = hub.tensors(config)
    assert tensors["model.embed_tokens.weight"].size % 2 == 1
    for layer in (0, 2):
        key = f"model.layers.{layer}.input_layernorm.weight"
        tensors[key] = tensors[key].astype(np.float32)
    saved = tmp_path / "saved"
    save_hugging_face(saved, model_of(tmp_path, config, tensors))
    hub.expect_same(hub.read(saved), tensors)
    raw = (saved / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_other_files_stay_and_old_weights_go(tmp_path):
    config = hub.config()
    model = model_of(tmp_path, config)
    saved = tmp_path / "saved"
    save_hugging_face(saved, model, max_shard_bytes=2000)
    (saved / "tokenizer.json").write_text("{}")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("mine")
    (saved / "link").symlink_to("notes/a.txt")
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already .*overwrite=True"):
        save_hugging_face(saved, model)
    save_hugging_face(saved, model, overwrite=True)
    assert sorted(hub.bytes_of(saved)) == [
        "config.json",
        "link",
        "model.safetensors",
        "notes/a.txt",
        "tokenizer.json",
    ]
    assert (saved / "link").readlink().as_posix() == "notes/a.txt"
    assert (saved / "link").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_copy_from_takes_the_tokenizer_along(tmp_path):
    config = hub.config()
    model = model_of(tmp_path, config)
    for name in ("tokenizer.json", "generation_config.json", "README.md", "chat_template.jinja"):
        (tmp_path / "hub" / name).write_text(f"{name} of the hub")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "tokenizer.json").write_text("an old one")
    save_hugging_face(saved, model, copy_from=tmp_path / "hub")
    assert sorted(hub.bytes_of(saved)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (saved / "tokenizer.json").read_text() == "tokenizer.json of the hub"


def test_copy_from_nowhere(tmp_path):
    model = model_of(tmp_path, hub.config())
    with pytest.raises(CheckpointError, match=r"copy_from is .*nowhere; expected a directory"):
        save_hugging_face(tmp_path / "saved", model, copy_from=tmp_path / "nowhere")
    assert not (tmp_path / "saved").exists()


def test_progress_adds_up_to_every_byte(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    calls = []
    model = model_of(tmp_path, config, tensors)
    save_hugging_face(
        tmp_path / "saved",
        model,
        max_shard_bytes=4000,
        progress=lambda *call: calls.append(call),
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(calls) == len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert calls[-1] == (total, total)
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})


def test_one_file_at_a_time_is_on_the_host(tmp_path):
    config = hub.config(num_experts=16, moe_intermediate_size=64, hidden_size=128, vocab_size=512)
    shapes = of_model(model_of(tmp_path, config)).shapes
    model = load_hugging_face(tmp_path / "hub")
    largest = 16 * 2 * 64 * 128 * 2
    reader = Reader(model.config, shapes, lambda name: np.ones(shapes[name].shape, hub.BF16))
    assert reader.nbytes > 3.5 * largest
    tracemalloc.start()
    write_hugging_face(tmp_path / "saved", reader, max_shard_bytes=largest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a file that ends in one stacked array and begins in another keeps both
    assert largest < peak < 2 * largest


@pytest.mark.parametrize("size", [0, -1, 1.5, "5GB"])
def test_max_shard_bytes(tmp_path, size):
    model = model_of(tmp_path, hub.config())
    with pytest.raises(ValueError, match=f"max_shard_bytes is {size!r}; expected a positive int"):
        save_hugging_face(tmp_path / "saved", model, max_shard_bytes=size)
    assert not (tmp_path / "saved").exists()


def test_dtype_that_no_checkpoint_has(tmp_path):
    model = model_of(tmp_path, hub.config())
    arrays = to_arrays(model)
    arrays["norm.weight"] = jnp.ones(16, jnp.int32)
    with pytest.raises(CheckpointError, match=r"norm\.weight is int32; expected bfloat16, float32"):
        save_hugging_face(tmp_path / "saved", from_arrays(model.config, arrays))


def test_model_that_does_not_fit_its_config(tmp_path):
    model = model_of(tmp_path, hub.config())
    model.config = dataclasses.replace(model.config, vocab_size=33, attention_bias=True)
    with pytest.raises(CheckpointError) as caught:
        save_hugging_face(tmp_path / "saved", model)
    assert ("shape", "lm_head.weight is [32, 16]; expected [33, 16]") in caught.value.problems
    assert ("missing", "layers.0.self_attn.k_proj.bias") in caught.value.problems


def test_host_copy_is_the_array():
    array = jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)
    assert hub.same(host_copy(array), np.asarray(array))
    assert isinstance(array, jax.Array)
