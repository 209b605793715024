"""Orbax round trips, on any dtype, and checkpoints that are damaged or of another version."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoints import (
    CheckpointError,
    detect_format,
    differences,
    load_hugging_face,
    load_orbax,
    open_checkpoint,
    open_orbax,
    orbax,
    save_hugging_face,
    save_orbax,
)
from moe_jax.checkpoints.readers import of_model
from moe_jax.parameters import from_arrays, to_arrays
from tests.moe_jax.checkpoints import hub, killed_saves, test_fp8

# Of Orbax's own event loop, after a file that cannot be read; maybe in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def arrays_of(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in to_arrays(model).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A layer of experts and a dense one."""
    config = hub.config(num_hidden_layers=2, attention_bias=True)
    return load_hugging_face(hub.write(tmp_path_factory.mktemp("hub"), config, hub.tensors(config)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    """The model's checkpoint, not to be changed."""
    path = tmp_path_factory.mktemp("orbax") / "saved"
    save_orbax(path, model)
    return path


def test_fp8_stays_fp8_or_is_dequantised(tmp_path):
    config = hub.config(num_hidden_layers=1, quantization_config=test_fp8.QUANTIZATION)
    tensors, _ = test_fp8.quantised(config)
    hub.write(tmp_path / "hub", config, tensors)
    model = load_hugging_face(tmp_path / "hub")
    save_orbax(tmp_path / "orbax", model)
    again = load_orbax(tmp_path / "orbax")
    assert again.config == model.config
    hub.expect_same(arrays_of(again), arrays_of(model))
    readers = [open_checkpoint(tmp_path / name) for name in ("hub", "orbax")]
    assert differences(*readers)[0] == []

    plain = load_hugging_face(tmp_path / "hub", dequantize=True)
    from_orbax = load_orbax(tmp_path / "orbax", dequantize=True)
    assert from_orbax.config == plain.config
    hub.expect_same(arrays_of(from_orbax), arrays_of(plain))
    readers = [open_checkpoint(tmp_path / name, dequantize=True) for name in ("hub", "orbax")]
    assert differences(*readers)[0] == []


@pytest.fixture
def copied(tmp_path, saved):
    """The model's checkpoint, to be changed."""
    return shutil.copytree(saved, tmp_path / "copied")


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [(hub.BF16, {}), (np.float32, {"tie_word_embeddings": True}), (np.float16, {})],
    ids=["bfloat16", "float32, tied", "float16"],
)
def test_round_trip_is_exact(tmp_path, changes, dtype):
    config = hub.config(num_hidden_layers=2, **changes)
    tensors = hub.tensors(config, np.dtype(dtype))
    written = load_hugging_face(hub.write(tmp_path / "hub", config, tensors))
    save_orbax(tmp_path / "saved", written)
    read = load_orbax(tmp_path / "saved")
    hub.expect_same(arrays_of(read), arrays_of(written))
    assert read.config == written.config
    assert read.config.extra["bos_token_id"] == 7


def test_paths_that_are_relative_or_begin_at_home(tmp_path, model, monkeypatch):
    """Orbax itself reads from absolute paths only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for written in ("here", "~/there/"):
        save_orbax(written, model)
        hub.expect_same(arrays_of(load_orbax(written)), arrays_of(model))
        reader = open_checkpoint(written)
        assert hub.same(reader.read("norm.weight"), arrays_of(model)["norm.weight"])
    save_hugging_face("~/hub", model, copy_from="~/there")
    assert detect_format("~/hub/") == "hugging_face"
    assert load_hugging_face("home/hub").config == load_hugging_face("~/hub").config
    assert sorted(str(path) for path in pathlib.Path().glob("*")) == ["here", "home"]
    assert sorted(path.name for path in pathlib.Path("home").glob("*")) == ["hub", "there"]
    for load in (load_orbax, open_orbax, load_hugging_face, open_checkpoint, detect_format):
        with pytest.raises(TypeError, match=r"(path|directory) is None; expected a path"):
            load(None)


def test_several_groups_are_one_checkpoint(tmp_path, model, monkeypatch):
    monkeypatch.setattr(orbax, "_GROUP_BYTES", 3000)
    saved, loaded = [], []
    save_orbax(tmp_path / "saved", model, progress=lambda *call: saved.append(call))
    read = load_orbax(tmp_path / "saved", progress=lambda *call: loaded.append(call))
    total = of_model(model).nbytes
    assert 3 < len(saved) < len(arrays_of(model)) / 2
    assert saved[-1] == (total, total)
    assert loaded == saved
    hub.expect_same(arrays_of(read), arrays_of(model))


def test_one_group_at_a_time_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "_GROUP_BYTES", 1)
    alive, most = set(), 0

    class Tracked(np.ndarray):
        def __array_finalize__(self, parent):
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    reader = killed_saves.reader(1)

    def read(name):
        nonlocal most
        array = np.ndarray.__new__(Tracked, reader.shapes[name].shape, hub.BF16)
        array[...] = 1
        most = max(most, len(alive))
        return array

    orbax.write_orbax(tmp_path / "saved", dataclasses.replace(reader, read=read))
    assert not differences(reader, open_orbax(tmp_path / "saved"))[0]
    assert most == 1


@pytest.mark.parametrize("dtype", ["float32", jnp.float16])
def test_dtype(saved, model, dtype):
    expected = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays_of(model).items()}
    hub.expect_same(arrays_of(load_orbax(saved, dtype=dtype)), expected)
    reader = open_orbax(saved, dtype=dtype)
    assert reader.shapes.keys() == expected.keys()
    for name in ("norm.weight", "layers.0.mlp.experts.gate_up"):
        assert hub.same(reader.read(name), expected[name])


def test_rounding_to_bfloat16_is_numpys(tmp_path, model):
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.standard_normal(array.shape, np.float32))
        for name, array in to_arrays(model).items()
    }
    save_orbax(tmp_path / "saved", from_arrays(model.config, arrays))
    expected = {name: np.asarray(array).astype(hub.BF16) for name, array in arrays.items()}
    hub.expect_same(arrays_of(load_orbax(tmp_path / "saved", dtype="bfloat16")), expected)


def test_what_is_on_disk_is_a_plain_tree(saved, model):
    """Orbax alone reads it, without a class of ours."""
    tree = ocp.load(saved)
    found = tree["layers"]["0"]["mlp"]["experts"]["gate_up"]
    assert hub.same(found, arrays_of(model)["layers.0.mlp.experts.gate_up"])
    metadata = ocp.metadata(saved).custom_metadata
    assert metadata["schema_version"] == 1
    assert metadata["config"]["num_experts"] == 4


def test_an_expert_is_the_unit_of_storage(saved):
    tree = ocp.metadata(saved).metadata["layers"]["0"]["mlp"]
    assert tree["experts"]["gate_up"].storage_metadata.chunk_shape == (1, 2, 8, 16)
    assert tree["experts"]["down"].storage_metadata.chunk_shape == (1, 16, 8)
    assert tree["gate"]["weight"].storage_metadata.chunk_shape == (4, 16)


def test_overwriting(tmp_path, copied, model):
    path = copied
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        save_orbax(path, model)
    other = from_arrays(model.config, {k: a + 1 for k, a in to_arrays(model).items()})
    save_orbax(path, other, overwrite=True)
    hub.expect_same(arrays_of(load_orbax(path)), arrays_of(other))
    assert (path / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_copy_from(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"copy_from is .*nowhere; expected a directory"):
        save_orbax(tmp_path / "saved", model, copy_from=tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_orbax(tmp_path / "saved", model, copy_from=tmp_path)
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"


def test_no_orbax_checkpoint(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="is no Orbax checkpoint"):
            load_orbax(path)


def change_metadata(path, **changes) -> None:
    file = path / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"] |= changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "has schema_version 3; expected at most 2"),
        ({"schema_version": None}, "has no schema_version and config"),
        ({"schema_version": "1"}, "has no schema_version and config"),
        ({"config": None}, "has no schema_version and config"),
        ({"config": {"hidden_size": -1}}, "hidden_size is -1; expected"),
        ({"config": {"model_type": "llama"}}, "model_type is 'llama'; expected 'qwen3_moe'"),
        ({"config": [1]}, "expected a mapping"),
        ({"config": {"shared_expert_intermediate_size": 8}}, "intermediate_size is 8; expected 0"),
    ],
)
def test_metadata_of_another_kind(copied, change, message):
    change_metadata(copied, **change)
    with pytest.raises(CheckpointError, match=message):
        load_orbax(copied)


def test_metadata_of_another_size(copied, model):
    change_metadata(copied, config=model.config.to_hf() | {"num_hidden_layers": 10**9})
    with pytest.raises(CheckpointError) as caught:
        load_orbax(copied)
    line = "all layers from 2 on; num_hidden_layers is 1000000000"
    assert caught.value.problems == (("missing", line),)


def test_checkpoint_that_orbax_wrote_for_somebody_else(tmp_path):
    ocp.save(tmp_path / "saved", {"w": np.ones(3)})
    with pytest.raises(CheckpointError, match="has no schema_version and config"):
        load_orbax(tmp_path / "saved")


def test_arrays_that_do_not_fit_the_config(tmp_path, model):
    tree = {"norm": {"weight": np.ones(17, np.float32)}, "extra": np.ones((2, 3), np.int32)}
    tree["embed_tokens"] = {"weight": np.ones((32, 16), np.int32)}
    metadata = {"schema_version": 1, "config": model.config.to_hf()}
    ocp.save(tmp_path / "saved", tree, custom_metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        load_orbax(tmp_path / "saved")
    problems = caught.value.problems
    assert ("shape", "norm.weight is [17]; expected [16]") in problems
    assert ("unexpected", "extra [2, 3]") in problems
    assert ("missing", "lm_head.weight; expected [32, 16]") in problems
    assert [line for kind, line in problems if kind == "dtype"] == [
        "embed_tokens.weight is dtype('int32'); expected one of bfloat16, float32, float16"
    ]


@pytest.mark.parametrize("what", ["cut off", "removed", "git-lfs"])
def test_damaged_files(tmp_path, what):
    """Every file without which the arrays cannot be read: an error, and never other numbers."""
    path = tmp_path / "saved"
    orbax.write_orbax(path, killed_saves.reader(1))
    expected = arrays_of(load_orbax(path))
    refused = 0
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        if what == "removed":
            file.unlink()
        else:
            file.write_bytes(
                content[: len(content) // 2] if what == "cut off" else hub.LFS.encode()
            )
        try:
            hub.expect_same(arrays_of(load_orbax(path)), expected)
        except CheckpointError as error:
            assert str(path) in str(error)
            assert what != "git-lfs" or str(error).startswith(f"{file} is a git-lfs pointer")
            refused += 1
        file.write_bytes(content)
    assert refused >= 4
    hub.expect_same(arrays_of(load_orbax(path)), expected)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_dtype_to_load_as(saved, dtype):
    with pytest.raises(CheckpointError, match=f"dtype is '{dtype}'; expected one of bfloat16"):
        load_orbax(saved, dtype=dtype)


def test_shardings_that_are_none(saved):
    with pytest.raises(TypeError, match=r"shardings\('embed_tokens.weight', .* is 3; expected"):
        load_orbax(saved, shardings=lambda name, shape: 3)
