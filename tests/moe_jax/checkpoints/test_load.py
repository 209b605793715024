"""A Hugging Face directory becomes a model: every tensor in its place, little of it on the host."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import hugging_face_load, load_hugging_face, open_hugging_face, placing
from moe_jax.checkpoints.hugging_face_check import inspect
from moe_jax.checkpoints.hugging_face_load import read_slice
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub


def load(directory, **kwargs):
    model = load_hugging_face(directory, **kwargs)
    return model, {name: np.asarray(array) for name, array in to_arrays(model).items()}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"mlp_only_layers": [0, 1, 2]},
        {"mlp_only_layers": []},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_every_tensor_is_in_its_place(tmp_path, changes, files):
    config = hub.config(**changes)
    tensors = hub.tensors(config)
    model, arrays = load(hub.write(tmp_path, config, tensors, files=files))
    assert model.config.attention_bias == config.get("attention_bias", False)
    found = {}
    for name, array in arrays.items():
        experts = name.removesuffix(".gate_up").removesuffix(".down")
        if name.endswith(".experts.gate_up"):
            for e in range(4):
                found[f"model.{experts}.{e}.gate_proj.weight"] = array[e, 0]
                found[f"model.{experts}.{e}.up_proj.weight"] = array[e, 1]
        elif name.endswith(".experts.down"):
            for e in range(4):
                found[f"model.{experts}.{e}.down_proj.weight"] = array[e]
        else:
            found[name if name == "lm_head.weight" else f"model.{name}"] = array
    hub.expect_same(found, tensors)


def test_decoder_sparse_step_says_which_layers_are_dense(tmp_path):
    config = hub.config(decoder_sparse_step=2)
    equivalent = hub.config(mlp_only_layers=[0, 2])
    _, arrays = load(hub.write(tmp_path, config | {"mlp_only_layers": []}, hub.tensors(equivalent)))
    assert "layers.1.mlp.experts.down" in arrays
    assert "layers.0.mlp.up_proj.weight" in arrays


def test_config_in_the_spelling_of_transformers_5(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    del config["rope_theta"], config["rope_scaling"], config["torch_dtype"]
    config["num_local_experts"] = config.pop("num_experts")
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    model = load_hugging_face(hub.write(tmp_path, config, tensors))
    assert (model.config.num_experts, model.config.rope.theta) == (4, 5e5)
    assert model.config.extra["bos_token_id"] == 7


@pytest.mark.parametrize("stored", [np.float32, np.float16, hub.BF16], ids=str)
def test_dtype_of_the_file_is_kept_unless_another_is_asked_for(tmp_path, stored):
    config = hub.config()
    tensors = hub.tensors(config, np.dtype(stored))
    hub.write(tmp_path, config, tensors)
    assert {array.dtype for array in load(tmp_path)[1].values()} == {np.dtype(stored)}
    for asked in (jnp.bfloat16, "float32", np.float16):
        _, arrays = load(tmp_path, dtype=asked)
        for name in ("norm.weight", "lm_head.weight"):
            key = name if name == "lm_head.weight" else f"model.{name}"
            assert hub.same(arrays[name], tensors[key].astype(jnp.dtype(asked)))
        assert {array.dtype for array in arrays.values()} == {jnp.dtype(asked)}


def test_each_parameter_keeps_its_own_dtype(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].astype(
        np.float32
    )
    _, arrays = load(hub.write(tmp_path, config, tensors))
    assert arrays["layers.0.mlp.gate.weight"].dtype == np.float32
    assert arrays["layers.2.mlp.gate.weight"].dtype == jnp.bfloat16


def test_what_no_parameter_reads_is_ignored_only_if_it_is_known(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    extra = {
        "model.rotary_emb.inv_freq": np.ones(6, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
    }
    _, arrays = load(hub.write(tmp_path, config, tensors | extra))
    assert not any("inv_freq" in name for name in arrays)


def test_head_of_a_tied_model_may_repeat_the_embedding(tmp_path):
    config = hub.config(tie_word_embeddings=True)
    tensors = hub.tensors(config)
    repeated = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    _, arrays = load(hub.write(tmp_path, config, tensors | repeated))
    assert "lm_head.weight" not in arrays


def test_progress_adds_up_to_every_byte(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    calls = []
    hub.write(tmp_path, config, tensors)
    load(tmp_path, dtype="float32", progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(calls) == len(tensors)
    assert {call[1] for call in calls} == {total}
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert calls[-1] == (total, total)


def test_a_slice_is_the_slice_of_the_whole(tmp_path):
    config = hub.config()
    files = inspect(hub.write(tmp_path, config, hub.tensors(config)))
    name = "layers.2.mlp.experts.gate_up"
    everything = (slice(None),) * 4
    whole = read_slice(files, name, everything)
    index = (slice(1, 3), slice(1, 2), slice(3, None), slice(None, 5))
    read = []
    part = read_slice(files, name, index, count=read.append)
    assert hub.same(part, whole[index])
    assert read == [5 * 5 * 2] * 2  # two experts' ups, five rows and columns of bfloat16 each
    assert hub.same(read_slice(files, name, everything, np.dtype(np.float32)), whole.astype("f4"))


def test_one_stacked_array_at_a_time_is_on_the_host(tmp_path, monkeypatch):
    """With devices that keep nothing on the host, its peak is one array and not the checkpoint."""
    config = hub.config(num_experts=16, moe_intermediate_size=64, hidden_size=128, vocab_size=512)
    tensors = hub.tensors(config)
    hub.write(tmp_path, config, tensors, files=2)
    total = sum(tensor.nbytes for tensor in tensors.values())
    largest = 16 * 2 * 64 * 128 * 2
    assert total > 3 * largest
    del tensors
    nothing = jnp.zeros(())
    puts = []
    monkeypatch.setattr(placing, "_put", lambda host, device: puts.append(host.nbytes) or nothing)
    monkeypatch.setattr(hugging_face_load, "from_arrays", lambda config, arrays: arrays)
    load_hugging_face(tmp_path)  # caches are filled
    puts.clear()
    tracemalloc.start()
    load_hugging_face(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (sum(puts), max(puts)) == (total, largest)
    assert largest < peak < 1.5 * largest


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path):
    config = hub.config()
    tensors = hub.tensors(config)
    model, _ = load(hub.write(tmp_path, config, tensors))
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place: what is mapped sees it
    norm = np.asarray(to_arrays(model)["norm.weight"])
    assert hub.same(norm, tensors["model.norm.weight"])


def test_open_reads_what_load_loads(tmp_path):
    config = hub.config()
    hub.write(tmp_path, config, hub.tensors(config))
    reader = open_hugging_face(tmp_path, dtype="float32")
    _, arrays = load(tmp_path, dtype="float32")
    hub.expect_same({name: reader.read(name) for name in reader.shapes}, arrays)
    assert reader.nbytes == sum(array.nbytes for array in arrays.values())


def test_a_loaded_model_runs(tmp_path):
    config = hub.config(num_hidden_layers=1)
    model = load_hugging_face(hub.write(tmp_path, config, hub.tensors(config, np.float32)))
    logits = jax.jit(lambda model, ids: model(ids).logits)(model, jnp.arange(6)[None])
    assert logits.shape == (1, 6, 32)
    assert bool(jnp.isfinite(logits).all())
