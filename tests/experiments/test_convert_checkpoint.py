"""The script end to end: both ways and back, what it prints, and what it refuses."""

import json
import pathlib
import re

import numpy as np
import pytest

from experiments import convert_checkpoint
from moe_jax.checkpoints import load_orbax
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub


@pytest.fixture
def source(tmp_path):
    config = hub.config(num_hidden_layers=1)
    directory = hub.write(tmp_path / "hub", config, hub.tensors(config), files=2)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "generation_config.json").write_text('{"eos_token_id": 3}')
    return directory


def run(*arguments) -> None:
    convert_checkpoint.run(arguments)


def test_there_and_back(tmp_path, monkeypatch, capsys, source):
    """As README writes it: in a folder, with paths that begin there. Then from the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    run("--from=hub", "--to=orbax", "--verify")
    there = capsys.readouterr().out
    run("--from=~/orbax/", "--to=~/back/", "--verify", "--max_shard_gb=2e-6")
    back = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hub", "orbax"]
    arrays = len(to_arrays(load_orbax("orbax")))
    assert f"hub (hugging_face): {arrays} arrays, 0.000 GB" in there
    assert "Wrote orbax (orbax)" in there
    for printed in (there, back):
        assert f"Verified: {arrays} arrays are equal, bit for bit" in printed
    checksum = re.compile(r"sha256 of the arrays: ([0-9a-f]{64})")
    assert checksum.search(there).group(1) == checksum.search(back).group(1)
    hub.expect_same(hub.read(tmp_path / "back"), hub.read(source))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    for name in ("tokenizer.json", "generation_config.json"):
        for directory in ("orbax", "back"):
            assert (tmp_path / directory / name).read_text() == (source / name).read_text()
    saved, original = (
        json.loads((directory / "config.json").read_text())
        for directory in (tmp_path / "back", source)
    )
    assert {key: saved[key] for key in original} == original


def test_dtype_and_format_are_chosen(tmp_path, capsys, source):
    """Hugging Face to Hugging Face, in another dtype, over what is there."""
    target = tmp_path / "target"
    arguments = (f"--from={source}", f"--to={target}", "--to_format=hugging_face", "--verify")
    run(*arguments)
    run(*arguments, "--dtype=float32", "--overwrite")
    expected = {key: array.astype(np.float32) for key, array in hub.read(source).items()}
    hub.expect_same(hub.read(target), expected)
    assert capsys.readouterr().out.count("Verified") == 2
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float32"


def test_verify_finds_what_differs(tmp_path, monkeypatch, source):
    """A conversion that went wrong: one bit, and the config."""
    honest = convert_checkpoint.write_hugging_face

    def dishonest(directory, *args, **kwargs):
        honest(directory, *args, **kwargs)
        path = directory + "/model.safetensors"
        tensors = hub.load_file(path)
        tensors["model.norm.weight"].view(np.uint8)[0] ^= 1
        hub.save_file(tensors, path)
        path = pathlib.Path(directory, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))

    monkeypatch.setattr(convert_checkpoint, "write_hugging_face", dishonest)
    message = rf"--verify: .*target differs from {source} in 2: config, norm\.weight"
    with pytest.raises(SystemExit, match=message):
        run(
            f"--from={source}",
            f"--to={tmp_path / 'target'}",
            "--to_format=hugging_face",
            "--verify",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["left", "over"], "takes flags only; left over: left over"),
        ([], "--from is empty; expected a directory"),
        (["--from=a"], "--to is empty; expected a directory"),
        (["--from=a", "--to=b/../a"], "--to is 'b/../a', as --from is; expected another directory"),
        (["--from=gs://a", "--to=b"], "--from is 'gs://a'; expected a path on this machine"),
        (["--from=a", "--to=b", "--dtype=int8"], "--dtype is 'int8'; expected one of bfloat16, fl"),
        (["--from=a", "--to=b", "--to_format=gguf"], "--to_format is 'gguf'; expected one of hugg"),
        (["--from=a", "--to=b", "--max_shard_gb=0"], "--max_shard_gb is 0.0; expected 1e-09 to"),
        (["--from=a", "--to=b", "--max_shard_gb=nan"], "--max_shard_gb is nan; expected 1e-09 to"),
        (["--from=nowhere", "--to=b"], "nowhere is no directory; expected a checkpoint"),
    ],
)
def test_flag_errors_are_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert message in str(caught.value)
    assert str(caught.value).startswith("convert_checkpoint")
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_or_is_there_already(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty holds no checkpoint; expected config.json with"):
        run(f"--from={tmp_path / 'empty'}", f"--to={tmp_path / 'b'}")
    with pytest.raises(SystemExit, match=r"holds a checkpoint already .config\.json."):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "config.json").write_text("mine")
        run(f"--from={source}", f"--to={tmp_path / 'b'}")
    assert hub.bytes_of(tmp_path / "b") == {"config.json": b"mine"}
    (source / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(SystemExit, match="hub holds both formats; expected"):
        run(f"--from={source}", f"--to={tmp_path / 'c'}")


def test_damage_and_other_quantisations_end_in_a_message(tmp_path, source):
    (source / "tokenizer.json").write_text(hub.LFS)
    with pytest.raises(SystemExit, match=r"hub/tokenizer\.json is a git-lfs pointer"):
        run(f"--from={source}", f"--to={tmp_path / 'b'}")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"1 problem \(1 missing file\)"):
        run(f"--from={source}", f"--to={tmp_path / 'b'}")
    config = hub.config(quantization_config={"quant_method": "gptq"})
    hub.write(tmp_path / "gptq", config, hub.tensors(config))
    with pytest.raises(SystemExit, match="quant_method is 'gptq'; expected quant_method 'fp8'"):
        run(f"--from={tmp_path / 'gptq'}", f"--to={tmp_path / 'b'}")
    assert not (tmp_path / "b").exists()
