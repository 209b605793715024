"""From a bfloat16 checkpoint to FP8, to text, and back: by the scripts, as a user runs them."""

import json

import numpy as np
import pytest

from experiments import convert_checkpoint, generate, quantize
from moe_jax.checkpoints import load_hugging_face, save_hugging_face
from moe_jax.checkpoints.safetensors_file import read_file
from moe_jax.parameters import to_arrays
from moe_jax.quantization import may_be_quantised
from tests.moe_jax.checkpoints import hub
from tests.moe_jax.scaled_weights import dequantised, quantised

CONFIG = hub.config(num_hidden_layers=1)
BLOCK = (10, 7)
SIZES = ("--block_rows=10", "--block_columns=7")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = hub.tensors(CONFIG)
    tensors["model.layers.0.self_attn.q_proj.weight"][:10, :7] = 0
    return hub.write(tmp_path_factory.mktemp("source") / "hub", CONFIG, tensors, files=2)


@pytest.fixture(scope="module")
def made(source):
    """The FP8 checkpoint, in several files."""
    to = source.parent / "fp8"
    quantize.run([f"--from={source}", f"--to={to}", *SIZES, "--max_shard_gb=3e-6"])
    return to


def test_values_scales_and_errors(source, made, capsys):
    plain = {n: np.asarray(a, np.float32) for n, a in to_arrays(load_hugging_face(source)).items()}
    found = to_arrays(load_hugging_face(made))
    errors = {"self_attn": [0, 0], "mlp": [0, 0]}
    for name, array in plain.items():
        if not may_be_quantised(name):
            assert hub.same(np.asarray(found[name], np.float32), array)
            continue
        expected = quantised(array, BLOCK)
        assert hub.same(found[f"{name}.values"], expected.values), name
        assert hub.same(found[f"{name}.scales"], expected.scales), name
        sums = errors[name.split(".")[2]]
        sums[0] += np.sum((dequantised(expected) - array) ** 2)
        sums[1] += np.sum(array**2)
    assert found["layers.0.self_attn.q_proj.weight.scales"][0, 0] == 1  # of zeros

    quantize.run([f"--from={source}", f"--to={made}", *SIZES, "--overwrite"])
    printed = capsys.readouterr().out
    for sums in (*errors.values(), np.sum(list(errors.values()), axis=0)):
        assert f"{np.sqrt(sums[0] / sums[1]):.3e}" in printed
    assert "0.000 GB became 0.000 GB" in printed


def test_the_round_trip_is_exact(made, tmp_path):
    save_hugging_face(tmp_path / "again", load_hugging_face(made))
    found = read_file(tmp_path / "again" / "model.safetensors")
    expected = {}
    for path in made.glob("*.safetensors"):
        expected |= read_file(path)
    hub.expect_same(found, expected)
    configs = [
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", made)
    ]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.mlp.gate",
    ]


def test_text_is_generated_from_it(made, capsys):
    options = ("--prompt_tokens=3", "--max_new_tokens=1", "--warm_up=false", "--temperature=0")
    generate.run([f"--checkpoint={made}", *options])
    assert "rows: 1, prompt tokens: 3, new tokens: 1" in capsys.readouterr().out


def test_it_is_converted_as_it_is_or_dequantised(made, tmp_path, capsys):
    shared = (f"--from={made}", "--to_format=hugging_face", "--verify")
    convert_checkpoint.run([*shared, f"--to={tmp_path / 'same'}"])
    convert_checkpoint.run([*shared, f"--to={tmp_path / 'plain'}", "--dequantize"])
    same, original = (to_arrays(load_hugging_face(path)) for path in (tmp_path / "same", made))
    hub.expect_same(same, original)
    assert capsys.readouterr().out.count("Verified") == 2
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    expected = load_hugging_face(made, dequantize=True)
    hub.expect_same(to_arrays(load_hugging_face(tmp_path / "plain")), to_arrays(expected))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, number):
    tensors = hub.tensors(CONFIG)
    key = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[key][3, 4] = number
    directory = hub.write(tmp_path / "hub", CONFIG, tensors)
    with pytest.raises(SystemExit, match=f"{key} has an inf or NaN; expected finite numbers"):
        quantize.run([f"--from={directory}", f"--to={tmp_path / 'fp8'}"])
    assert not (tmp_path / "fp8").exists()


def test_what_is_refused(made, tmp_path):
    with pytest.raises(SystemExit, match="are FP8 already; expected plain parameters"):
        quantize.run([f"--from={made}", f"--to={tmp_path / 'fp8'}"])
    with pytest.raises(SystemExit, match=r"--to is .*, as --from is; expected another directory"):
        quantize.run([f"--from={made}", f"--to={made}"])
