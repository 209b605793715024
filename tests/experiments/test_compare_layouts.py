"""The script end to end on a CPU, its flags' errors, and that a failure does not stop the rest."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments import compare_layouts
from experiments.compare import candidates, layers, on_cpu, on_gpu, read_ceiling, records, run
from experiments.compare import settings as settings_module
from pallas_kernels.decode_experts.shapes import SHAPES

on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what a machine without GPU does"
)

FLAGS = {
    "preset": "tiny",
    "tokens": ["1"],
    "layouts": ["output_major"],
    "routing": "uniform",
    "baselines": ["xla_gather"],
    "dtype": "bf16",
    "repeats": 2,
    "seed": 0,
    "device_times": True,
    "out": "out",
    "commit": "abc",
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "gpt"}, "--preset has 'gpt'; expected one of tiny, qwen3_30b_a3b"),
        ({"tokens": ["1", "two"]}, "--tokens has 'two'; expected whole numbers from 1"),
        ({"tokens": ["0"]}, "--tokens has '0'"),
        ({"tokens": []}, "--tokens is empty"),
        ({"layouts": ["row_major"]}, "--layouts has 'row_major'; expected one of output_major"),
        ({"baselines": ["cutlass"]}, "--baselines has 'cutlass'; expected one of xla_gather"),
        ({"layouts": [], "baselines": []}, "both empty"),
        ({"routing": "normal"}, "--routing is 'normal'"),
        ({"routing": "trace:nowhere.npz"}, "trace:nowhere.npz: there is no such file"),
        ({"dtype": "fp8"}, "--dtype has 'fp8'; expected one of bf16, fp32"),
        ({"repeats": 0}, "--repeats is 0; expected 1 to"),
        ({"seed": -1}, "--seed is -1; expected 0 to"),
        ({"seed": 2**31}, "--seed is 2147483648; expected 0 to"),
        ({"out": ""}, "--out is empty"),
        ({"out": __file__}, "--out is .*; expected a folder to write to"),
    ],
)
def test_flag_errors_name_the_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        settings_module.parse(**{**FLAGS, **flags})


def test_result_path_has_the_routing_unless_uniform(tmp_path):
    asked = settings_module.parse(**{**FLAGS, "out": str(tmp_path), "routing": "zipf"})
    assert asked.result_path("h100", "tiny", "zipf", ".jsonl") == tmp_path / "h100_tiny_zipf.jsonl"
    asked = settings_module.parse(**FLAGS)
    assert asked.result_path("h100", "tiny", "uniform", ".png").name == "h100_tiny.png"
    asked = settings_module.parse(**{**FLAGS, "dtype": "fp32"})
    assert asked.result_path("h100", "tiny", "uniform", ".png").name == "h100_tiny_fp32.png"


def _run_script(monkeypatch, *arguments):
    argv = ["compare_layouts", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        compare_layouts.main(flags.FLAGS(argv))


@on_a_cpu
def test_script_on_a_cpu(tmp_path, monkeypatch, capsys):
    _run_script(
        monkeypatch,
        "--tokens=1,64",
        "--layouts=expert_major,auto",
        "--baselines=xla_dense,bf16_rounding",
        "--repeats=2",
        f"--out={tmp_path}",
        "--commit=abc",
    )
    printed = capsys.readouterr().out
    assert "times mean nothing" in printed
    assert "qwen3_30b_a3b, uniform routing: bytes" in printed
    environment, measurements = records.read(tmp_path / "cpu_tiny.jsonl")
    assert "--tokens=1,64 --layouts=expert_major" in environment.command
    assert environment.read_ceiling_tbps is None
    by_name = {m.name: m for m in measurements}
    assert set(by_name) == {"expert_major", "auto", "xla_dense", "bf16_rounding"}
    assert by_name["auto"].config["layout"] == "output_major"
    layout = by_name["expert_major"]
    assert (layout.tokens, layout.chain_us, layout.unique_tbps) == (1, None, None)
    assert layout.rel_error_before_rounding < 1e-4
    assert by_name["xla_dense"].chain_us > 0
    assert by_name["bf16_rounding"].chain_us is None
    assert by_name["bf16_rounding"].rel_error > layout.rel_error
    assert (tmp_path / "cpu_tiny.png").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("qwen3_30b_a3b", "takes flags only; left over: qwen3_30b_a3b"),
        ("--tokens=many", "compare_layouts: --tokens has 'many'"),
    ],
)
def test_script_refuses_what_it_cannot_take(monkeypatch, argument, message):
    with pytest.raises(SystemExit, match=message):
        _run_script(monkeypatch, argument)


def _failing(*_):
    raise RuntimeError("this one is broken")


def _zeros(x, weights, expert_ids, expert_weights):
    return jnp.zeros_like(x)


def test_failures_are_recorded_and_the_rest_goes_on(tmp_path):
    shapes = SHAPES["tiny"]
    asked = settings_module.parse(**FLAGS)
    good, _ = candidates.make_baselines(["xla_gather"], jnp.bfloat16)
    broken = [
        candidates.Candidate(kind="layout", name="broken", backend="none", layer=_failing),
        candidates.Candidate(kind="layout", name="zeros", backend="none", layer=_zeros),
    ]
    plan = run.Plan(
        settings=asked,
        preset="tiny",
        shapes=shapes,
        tokens=(1, 2),
        routing="uniform",
        layers=[layers.make_layer(jax.random.key(0), shapes)],
        candidates=[*broken, *good],
        steps=2,
        accuracy_routings=1,
        ceiling_tbps=None,
    )
    saved, said = [], []
    measurements = run.run(plan, lambda what: None, said.append, lambda ms: saved.append(len(ms)))
    assert saved == [3, 6]
    by_name = {m.name: m for m in measurements if m.tokens == 2}
    assert "this one is broken" in by_name["broken"].error
    assert "zeros" in by_name["zeros"].error
    assert by_name["zeros"].rel_error == 1.0
    assert by_name["xla_gather"].error is None
    assert by_name["xla_gather"].chain_us > 0
    assert len(said) == 4


@on_a_cpu
def test_gpu_flow_outlives_a_machine_without_a_gpu(tmp_path, monkeypatch):
    """The GPU's order of work with a made-up ceiling: Mosaic and CUPTI fail, XLA goes through."""
    ceiling = read_ceiling.ReadCeiling(3.0, "made up", {"made up": 3.0, "broken": None})
    monkeypatch.setattr(read_ceiling, "measure", lambda: ceiling)
    asked = settings_module.parse(**{**FLAGS, "out": str(tmp_path)})
    with (tmp_path / "log").open("w") as log:
        assert on_gpu.compare(asked, Console(file=log, width=120)) == 1
    lines = [json.loads(line) for line in (tmp_path / "cpu_tiny.jsonl").read_text().splitlines()]
    assert lines[0]["read_ceiling_tbps"] == 3.0
    layout, baseline = lines[1:]
    assert "error" in layout["config"]
    assert baseline["ceiling_share"] > 0
    assert baseline["device_us"] is None
    assert "CUPTI" in baseline["config"]["device_us_error"]
    assert "L2 is not cold at T = 1" in (tmp_path / "log").read_text()

    without = dataclasses.replace(asked, device_times=False)
    with (tmp_path / "log").open("w") as log:
        assert on_gpu.compare(without, Console(file=log, width=120)) == 1
    _, [_, baseline] = records.read(tmp_path / "cpu_tiny.jsonl")
    assert baseline.chain_us > 0
    assert baseline.device_us is None
    assert "device_us_error" not in baseline.config


@on_a_cpu
def test_cpu_flow_reads_a_trace_for_the_byte_model_only(tmp_path):
    trace = tmp_path / "t.npz"
    np.savez(trace, expert_ids=np.arange(8)[None] + np.zeros((5, 1), int))
    asked = settings_module.parse(
        **{
            **FLAGS,
            "preset": "qwen3_30b_a3b",
            "routing": f"trace:{trace}",
            "layouts": [],
            "out": str(tmp_path),
        }
    )
    with (tmp_path / "log").open("w") as log:
        assert on_cpu.compare(asked, Console(file=log, width=120)) == 0
    _, measurements = records.read(tmp_path / "cpu_tiny.jsonl")
    assert {m.routing for m in measurements} == {"uniform"}
    log = (tmp_path / "log").read_text()
    assert "8.0" in log
    assert "uniform routing" in log


def test_nothing_left_to_run_says_why():
    with pytest.raises(SystemExit, match="nothing is left to run; vllm is not installed"):
        candidates.expect_some([], ["vllm is not installed"])
