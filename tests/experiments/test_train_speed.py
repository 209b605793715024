"""The script that times training steps: what it counts, what it refuses, one run of it."""

import dataclasses
import json

import pytest

from experiments import train_speed
from moe_jax.presets import PRESETS


def test_model_flops_are_those_of_the_parameters_and_keys_in_use():
    config = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)
    H, I, K, E, V, heads, kv, D = 64, 64, 2, 8, 512, 4, 2, 32
    attention = 2 * (heads + kv) * D * H + 2 * D
    experts, router, norms = K * 3 * H * I, E * H, 3 * H
    products = 6 * (attention + experts + router + norms + V * H)
    expected = products + 12 * heads * D * (10 + 1) / 2
    assert train_speed.model_flops_per_token(config, 10) == expected


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mesh=pipe=2", "--mesh has 'pipe=2'; expected each of data, expert, tensor once at mo"),
        ("--layers=3", "--layers is 3; expected 1 to 2"),
    ],
)
def test_wrong_flags(flag, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_speed.run(["--preset=tiny", flag, f"--out={tmp_path}"])


@pytest.mark.slow
def test_it_times_every_mesh_and_goes_on_after_a_failure(tmp_path):
    flags = "--preset=tiny --layers=1 --batch=2 --context=16 --steps=1 --commit=abc"
    meshes = ("--mesh=tensor=3", "--mesh=one", "--mesh=expert=1")
    with pytest.raises(SystemExit, match="tensor=3 failed: ValueError: there are"):
        train_speed.run([*flags.split(), *meshes, f"--out={tmp_path}"])
    lines = map(json.loads, (tmp_path / "cpu_tiny.jsonl").read_text().splitlines())
    failed, one, mesh = (line for line in lines if line["kind"] == "train_speed")
    assert failed["error"].startswith("ValueError")
    assert one["loss"] == pytest.approx(mesh["loss"], rel=1e-3)  # both are bfloat16
    for row in (one, mesh):
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["step_s"])
        assert row["mfu"] == pytest.approx(row["model_tflops"] / 989)
        assert row["backends"]["experts"] == "portable"
