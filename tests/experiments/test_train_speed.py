"""The script that times training steps: what it counts, what it refuses, one run of it."""

import dataclasses
import json

import pytest

from experiments import train_speed
from experiments.bench import records, speed_records
from moe_jax.presets import PRESETS
from tests.experiments.test_records import RUN


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
        ("--routing=model,even", "routing is 'even'; expected uniform, balanced, zipf"),
    ],
)
def test_wrong_flags(flag, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_speed.run(["--preset=tiny", "--layers=2", flag, f"--out={tmp_path}"])


def test_a_row_says_where_its_time_went(tmp_path):
    sizes = {"layers": 1, "batch": 2, "accumulate": 1, "context": 16}
    row = speed_records.TrainSpeedRow(
        run=RUN, mesh="one", routing="balanced", parameters=9, active_parameters=5, **sizes
    )
    assert row.kernel_lines == []
    row.step_s, row.kernels = 0.1, {"experts products": [12.0, 60500.0], "rest": [3.0, 1000.0]}
    assert row.kernel_lines == [
        "     60.500 ms in    12.0 launches a step: experts products",
        "      1.000 ms in     3.0 launches a step: rest",
        "     61.500 ms of kernels in a step of 100.000 ms",
    ]
    path = tmp_path / "h200_tiny.jsonl"
    record = records.Record(preset="tiny", rows=[row])
    records.write_record(path, record)
    assert speed_records.read_record(path) == record


def test_the_committed_records_can_be_read():
    found = sorted((records.RESULTS / "train_speed").glob("*.jsonl"))
    assert found
    for path in found:
        record = speed_records.read_record(path)
        assert path.stem == f"{record.rows[0].run.device}_{record.preset}"
        for row in record.rows:
            assert row.error is None
            config = dataclasses.replace(PRESETS[record.preset], num_hidden_layers=row.layers)
            flops = train_speed.model_flops_per_token(config, row.context)
            assert row.model_tflops == pytest.approx(flops * row.tokens_per_s / 1e12)


@pytest.mark.slow
def test_it_times_every_mesh_and_goes_on_after_a_failure(tmp_path):
    flags = "--preset=tiny --layers=1 --batch=2 --context=16 --steps=1 --commit=abc"
    flags += " --routing=balanced --profile"
    meshes = ("--mesh=tensor=3", "--mesh=one", "--mesh=expert=1")
    with pytest.raises(SystemExit, match="tensor=3, balanced failed: ValueError: there are"):
        train_speed.run([*flags.split(), *meshes, f"--out={tmp_path}"])
    lines = map(json.loads, (tmp_path / "cpu_tiny.jsonl").read_text().splitlines())
    failed, one, mesh = (line for line in lines if line["kind"] == "train_speed")
    assert failed["error"].startswith("ValueError")
    assert one["loss"] == pytest.approx(mesh["loss"], rel=1e-3)  # both are bfloat16
    for row in (one, mesh):
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["step_s"])
        assert row["mfu"] == pytest.approx(row["model_tflops"] / 989)
        assert row["backends"]["experts"] == "portable"
        assert (row["routing"], row["imbalance"]) == ("balanced", [1.0])
        assert row["profile_error"].endswith("no GPU kernel; the platform is cpu")
