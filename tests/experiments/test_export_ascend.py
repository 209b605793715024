"""The script: what it writes, that --check finds it right, and that it finds what is wrong."""

import dataclasses
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export_ascend
from experiments.ascend import artifact, folder, iree, step
from experiments.ascend.comparison import BOUNDS, compare
from moe_jax.checkpoints.safetensors_file import read_file
from moe_jax.presets import PRESETS
from moe_jax.superkernel import VERSION
from tests.moe_jax.checkpoints import hub

SIZES = {"B": 2, "S": 8, "capacity": 32}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The preset with one layer: most of the time goes into compiling, by XLA and by IREE."""
    with pytest.MonkeyPatch.context() as patch:
        config = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)
        patch.setitem(PRESETS, "tiny", config)
        yield config


def run(*arguments) -> None:
    export_ascend.run(arguments)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A float32 artifact with weights, in FP8 where they can be, to damage copies of."""
    out = tmp_path_factory.mktemp("ascend") / "out"
    sizes = ("--dtype=float32", "--weights=fp8", "--batch=2", "--superkernel=moe")
    run("--preset=tiny", f"--out={out}", *sizes)
    return out


@pytest.fixture
def copied(exported, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_float32_is_checked_from_what_lies_there(exported, capsys):
    run(f"--out={exported}", "--check")
    printed = capsys.readouterr().out
    assert printed.count("passed") == 4 and "FAILED" not in printed
    assert "IREE, the shipped StableHLO" in printed


@pytest.mark.slow  # float32's bounds are the sharper ones
def test_bfloat16_is_exported_and_checked(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    run("--preset=tiny", f"--out={out}", "--batch=2", "--steps=6", "--seed=1", "--check")
    printed = capsys.readouterr().out
    assert printed.count("passed") == 3 and "FAILED" not in printed
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["attention", "model"])
def test_other_scopes_are_checked(tmp_path, scope):
    run("--preset=tiny", f"--out={tmp_path / 'out'}", f"--superkernel={scope}", "--check")


def test_the_manifest_says_how_to_call(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    decode = manifest["functions"]["decode"]
    names = [each["name"] for each in decode["arguments"]]
    assert names.index("input_ids") == len([name for name in names if name.startswith("params/")])
    assert decode["arguments"][names.index("cache/keys/0")] == {
        "name": "cache/keys/0",
        "shape": [2, 2, 64, 32],
        "dtype": "float32",
    }
    assert [each["name"] for each in decode["results"]][-2:] == ["logits", "next_ids"]
    assert decode["composites"] == [
        {
            "name": "superkernel.moe_experts",
            "version": VERSION,
            "attributes": {"stream_fusion": False},
        }
    ]
    assert manifest["functions"]["prefill"]["composites"] == []
    assert manifest["config"]["enable_superkernel"] and manifest["superkernel"] == "moe"
    assert manifest["weights"]["file"] == "weights.safetensors"
    weights = read_file(exported / "weights.safetensors")
    assert set(weights) == {
        name.removeprefix("params/") for name in names if name.startswith("params/")
    }
    assert weights["layers.0.mlp.experts.down.values"].dtype == hub.FP8


def test_abstract_weights_give_no_sample(tmp_path):
    out = tmp_path / "out"
    run("--preset=tiny", f"--out={out}", "--abstract")
    names = ["decode.jax_export", "decode.mlir", "manifest.json"]
    assert sorted(path.name for path in out.iterdir()) == [
        *names,
        "prefill.jax_export",
        "prefill.mlir",
    ]
    with pytest.raises(SystemExit, match="exported with --abstract: there is nothing to run"):
        run(f"--out={out}", "--check")


def test_a_checkpoint_brings_its_config_and_dtype(tmp_path):
    checkpoint = hub.write(tmp_path / "hub", hub.config(), hub.tensors(hub.config()))
    out = tmp_path / "out"
    run(f"--checkpoint={checkpoint}", f"--out={out}", "--superkernel=model", "--abstract")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    assert manifest["weights"]["origin"] == {"checkpoint": str(checkpoint)}
    assert manifest["config"]["num_hidden_layers"] == 3
    [composite] = manifest["functions"]["decode"]["composites"]
    assert composite["name"] == "superkernel.decode_layers"


@pytest.mark.parametrize(
    "name", ["decode.jax_export", "prefill.mlir", "weights.safetensors", "sample.safetensors"]
)
def test_damage_ends_in_a_message(copied, name):
    path = copied / name
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=rf"{name} was cut off or changed: its bytes is \d+"):
        run(f"--out={copied}", "--check")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit, match=rf"{name} was cut off or changed: its sha256 is "):
        run(f"--out={copied}", "--check")
    path.unlink()
    with pytest.raises(SystemExit, match=rf"{name} is missing; export again"):
        run(f"--out={copied}", "--check")


def test_a_damaged_manifest_ends_in_a_message(copied):
    path = copied / "manifest.json"
    text = path.read_text()
    for damaged, message in (
        (text[:100], "is not valid JSON"),
        ("[]", "is of format list"),
        (text.replace('"format_version": 1', '"format_version": 2'), r"expected \('warp-decode"),
    ):
        path.write_text(damaged)
        with pytest.raises(SystemExit, match=message):
            run(f"--out={copied}", "--check")
    path.unlink()
    with pytest.raises(SystemExit, match=r"holds no artifact: there is no manifest\.json"):
        run(f"--out={copied}", "--check")


def resealed(out: pathlib.Path) -> None:
    """As if the directory had been written so."""
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    folder.seal(out, manifest)


def test_forms_that_are_two_modules_are_found(exported, copied):
    (copied / "decode.mlir").write_bytes((copied / "prefill.mlir").read_bytes())
    resealed(copied)
    with pytest.raises(SystemExit, match=r"decode\.mlir holds other operations than the manifest"):
        run(f"--out={copied}", "--check")
    text = (exported / "decode.mlir").read_text()
    changed = text.replace("dense<9.99999997E-7>", "dense<9.99999974E-5>")
    assert changed != text
    (copied / "decode.mlir").write_text(changed)
    resealed(copied)
    with pytest.raises(SystemExit, match=r"jax_export holds another module than .*decode\.mlir"):
        run(f"--out={copied}", "--check")
    (copied / "decode.jax_export").write_bytes(b"no flatbuffer")
    resealed(copied)
    with pytest.raises(SystemExit, match=r"decode\.jax_export cannot be deserialised by this JAX"):
        run(f"--out={copied}", "--check")


@pytest.mark.slow
def test_a_computation_that_is_not_the_shipped_one_is_found(copied, capsys):
    """The manifest's config has another epsilon than what was exported."""
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["rms_norm_eps"] = 1e-4
    path.write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="--check failed"):
        run(f"--out={copied}", "--check")
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search("passed|FAIL", line)]
    failed = {line.split("│")[1].strip(): "FAILED" in line for line in rows}
    assert failed == {
        "the sample": True,
        "export for cpu and ascend, no scope": False,
        "export for cpu": False,
        "IREE, the shipped StableHLO": True,
    }


def _changed(name, change):
    def apply(results):
        results[-1][name] = change(results[-1][name])

    return apply


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda results: None, True),
        (lambda results: results[0].pop("cache/keys/0"), True),
        (_changed("logits", lambda x: x * np.float32(1 + 5e-6)), True),
        (_changed("logits", lambda x: x * np.float32(1 + 2e-5)), False),
        (_changed("logits", lambda x: x * np.nan), False),
        (_changed("logits", lambda x: x[:, ::-1]), False),
        (_changed("next_ids", lambda x: x * 0), False),
        (_changed("cache/keys/0", lambda x: x * np.float32(1 + 2e-5)), False),
        (_changed("cache/keys/0", lambda x: x.swapaxes(0, 1)), False),
        (_changed("cache/lengths", lambda x: x + 1), False),
    ],
)
def test_what_a_comparison_lets_pass(change, passes):
    random = np.random.default_rng(0)

    def results():
        logits = random.normal(size=(2, 16)).astype(np.float32)
        logits[:, 3] = 9
        return {
            "cache/keys/0": random.normal(size=(2, 2, 4, 8)).astype(np.float32),
            "cache/lengths": np.array([3, 2], np.int32),
            "logits": logits,
            "next_ids": np.array([3, 3], np.int32),
        }

    expected = [results(), results(), results()]
    found = [dict(each) for each in expected]
    change(found)
    assert compare("it", found, expected, BOUNDS["float32"]).passed is passes


def test_without_iree_the_message_names_the_extra(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "iree.compiler.tools", None)
    with pytest.raises(SystemExit, match=r"IREE, which is not installed .*the extra 'ascend'"):
        run(f"--out={exported}", "--check")


def test_what_iree_does_not_compile_ends_in_a_message(tmp_path):
    (tmp_path / "bad.mlir").write_text("module {")
    with pytest.raises(folder.ArtifactError, match=r"IREE does not compile .*bad\.mlir"):
        iree.iree_runner(tmp_path, {"decode": {"stablehlo": "bad.mlir"}})


def test_only_artifacts_are_replaced(copied, tmp_path):
    (copied / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "decode.mlir").write_text("mine")
    for out, message in (
        (copied, "which holds notes.txt; expected a new or empty directory"),
        (tmp_path / "file", "a file; expected a directory"),
        (tmp_path / "other", "which holds decode.mlir; expected a new or empty"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("--preset=tiny", f"--out={out}", "--abstract")
    (copied / "notes.txt").unlink()
    run("--preset=tiny", f"--out={copied}", "--abstract")
    assert not (copied / "weights.safetensors").exists()


def test_a_failed_export_leaves_what_was_there(copied, monkeypatch):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    monkeypatch.setattr(artifact, "seal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--preset=tiny", f"--out={copied}", "--abstract")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


TINY = ("--preset=tiny", "--out=out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["left", "over"], "takes flags only; left over: left over"),
        (["--preset=tiny"], "--out is empty; expected a directory"),
        (["--out=out"], "--preset and --checkpoint are empty; expected one of the two, or --check"),
        ([*TINY, "--checkpoint=a"], "--preset is 'tiny' with --checkpoint; expected one of the"),
        (["--preset=huge", "--out=out"], "--preset is 'huge'; expected one of tiny, qwen3_30b"),
        ([*TINY, "--batch=0"], "--batch is 0; expected 1 to 2147483647"),
        ([*TINY, "--dtype=int8"], "--dtype is 'int8'; expected one of bfloat16, float32"),
        ([*TINY, "--superkernel=all"], "--superkernel is 'all'; expected one of off, moe, attent"),
        ([*TINY, "--cache_length=19"], "--cache_length is 19; expected at least 20, --prompt_l"),
        ([*TINY, "--abstract", "--check"], "--abstract is given with --check"),
        (["--out=out", "--check", "--seed=0"], "--seed is 0 without --preset or --checkpoint"),
        (["--out=out", "--check"], "out holds no artifact: there is no manifest.json"),
        (["--out=out", "--checkpoint=a"], "a is no directory; expected a checkpoint"),
    ],
)
def test_flag_errors_are_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert message in str(caught.value)
    assert str(caught.value).startswith("export_ascend")
    assert "\n" not in str(caught.value)


def test_the_functions_take_their_arguments_in_the_listed_order():
    arguments = step.abstract_arguments(
        PRESETS["tiny"], "prefill", dtype=jnp.dtype("float32"), **SIZES
    )
    assert list(arguments) == ["params", "input_ids", "attention_mask", "cache"]
