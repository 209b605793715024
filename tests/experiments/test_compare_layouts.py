"""The script end to end on a CPU, its flags' errors, and that a failure does not stop the rest."""

import dataclasses
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import compare_layouts
from experiments.bench import candidates, comparison, environment, records, script
from experiments.bench.candidates import Candidate, Program
from experiments.bench.inputs import draw_layers
from pallas_kernels.decode_experts.shapes import SHAPES

on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what a machine without GPU does"
)
TINY = SHAPES["tiny"]


def parse(*flags):
    return script.parse_settings(compare_layouts.Settings, flags)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--preset=gpt", "--preset is 'gpt'; expected one of tiny, qwen3_30b_a3b"),
        ("--tokens=1,two", "--tokens has 'two'; expected 1 to"),
        ("--tokens=0", "--tokens has 0; expected 1 to"),
        ("--tokens=", "--tokens is empty; expected whole numbers from 1"),
        ("--layouts=row_major", "--layouts has 'row_major'; expected one of output_major"),
        ("--baselines=cutlass", "--baselines has 'cutlass'; expected one of xla_gather"),
        ("--layouts= --baselines=", "both empty"),
        ("--routing=uniform,normal", "routing is 'normal'; expected uniform, balanced, zipf"),
        ("--routing=trace:nowhere.npz", "trace:nowhere.npz: there is no such file"),
        ("--weights=int4", "--weights has 'int4'; expected one of bf16, fp8"),
        ("--weights=", "--weights is empty; expected a format"),
        ("--dtype=fp8", "--dtype is 'fp8'; expected one of bf16, fp32"),
        ("--repeats=0", "--repeats is 0; expected 1 to"),
        ("--seed=2147483648", "--seed is 2147483648; expected 0 to"),
        ("--out=", "--out is empty"),
        (f"--out={__file__}", "expected a folder to write to"),
    ],
)
def test_flag_errors_name_the_flag(flag, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*flag.split())
    assert str(stopped.value).startswith("compare_layouts: ")
    assert message in str(stopped.value)


@on_a_cpu
def test_script_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_layouts", "--made=up"])
    compare_layouts.run(
        [
            "--tokens=1,64",
            "--layouts=output_major,auto",
            "--baselines=xla_dense,bf16_rounding",
            "--repeats=2",
            f"--out={tmp_path}",
        ],
    )
    printed = capsys.readouterr().out
    assert "times mean nothing" in printed
    assert "qwen3_30b_a3b, uniform routing: bytes" in printed
    record = records.read_record(tmp_path / "cpu_tiny.jsonl")
    assert record.preset == "tiny"
    run = record.rows[0].run
    assert "--made=up" in run.command and run.read_ceiling_tbps is None
    by_name = {row.name: row for row in record.rows}
    assert len(record.rows) == len(by_name) == 4
    assert by_name["auto"].config["layout"] == "output_major"
    layout = by_name["output_major"]
    assert (layout.tokens, layout.chain_us, layout.unique_tbps) == (1, None, None)
    assert layout.rel_error_before_rounding < 1e-4
    assert layout.rounding_error == pytest.approx(layout.rel_error, rel=0.05)
    assert by_name["auto"].rel_error == layout.rel_error  # it is the same program
    assert by_name["xla_dense"].chain_us > 0
    assert by_name["xla_dense"].same_bits_repeated is True
    assert by_name["bf16_rounding"].chain_us is None
    assert by_name["bf16_rounding"].rel_error > layout.rel_error
    assert (tmp_path / "cpu_tiny.png").exists()


def _failing(*_):
    raise RuntimeError("this one is broken")


def _zeros(x, weights, expert_ids, expert_weights):
    return jnp.zeros_like(x)


def _made_up(name, layer, **fields):
    jitted = jax.jit(layer)
    at = lambda T: Program(name, jitted)  # noqa: E731
    return Candidate(kind="layout", name=name, backend="none", at=at, **fields)


@pytest.fixture(scope="module")
def plan():
    good, _ = candidates.make_baselines(["xla_gather"], jnp.bfloat16)
    return comparison.ComparisonPlan(
        run=environment.describe(seed=0, repeats=2, commit="abc", read_ceiling_tbps=3.0),
        shapes=TINY,
        tokens=(1, 2),
        routings=("uniform", "zipf"),
        other_tokens=(2, 8),
        dtype="bf16",
        out_dtype=jnp.bfloat16,
        layers=draw_layers(TINY, 0, 1),
        candidates=[_made_up("broken", _failing), _made_up("zeros", _zeros), *good],
        num_steps=2,
        num_cases=1,
    )


def test_failures_are_recorded_and_the_rest_goes_on(plan):
    saved, said = [], []
    made = comparison.LayoutComparison(
        plan=plan, say=said.append, save=lambda rows: saved.append(len(rows))
    )
    rows = made.run()
    assert saved == list(range(1, 10))  # each row, as soon as it is there
    assert [(row.tokens, row.routing) for row in rows[::3]] == [
        (1, "uniform"),
        (2, "uniform"),
        (2, "zipf"),
    ]
    by_name = {row.name: row for row in rows if (row.tokens, row.routing) == (2, "zipf")}
    assert "this one is broken" in by_name["broken"].error
    assert "zeros" in by_name["zeros"].error
    assert by_name["zeros"].rel_error == 1.0
    assert by_name["xla_gather"].error is None
    assert by_name["xla_gather"].chain_us > 0
    assert len([line for line in said if line.startswith("FAILED")]) == 6
    assert "L2 is not cold at T = 2, zipf" in "\n".join(said)


def test_other_routings_run_in_the_programs_of_the_first(plan, monkeypatch):
    traced = []

    def counted(x, weights, expert_ids, expert_weights):
        traced.append(x.shape)
        return candidates.baselines.xla_gather(x, weights, expert_ids, expert_weights)

    one = [_made_up("one", counted), _made_up("same", counted)]
    same = dataclasses.replace(one[1], at=one[0].at)
    made = comparison.LayoutComparison(plan=dataclasses.replace(plan, candidates=[one[0], same]))
    rows = made.run()
    assert len(rows) == 6
    assert traced == [(1, 128), (2, 128)]  # once a T: for chain, errors and bits, both routings
    uniform, zipf = (row for row in rows if row.name == "one" and row.tokens == 2)
    assert uniform.unique_bytes != zipf.unique_bytes or uniform.rel_error != zipf.rel_error


def test_the_budget_stops_it_between_rows(plan, monkeypatch):
    clock = iter([0.0] * 5 + [2.0] * 100)
    made = comparison.LayoutComparison(plan=dataclasses.replace(plan, deadline=1.0))
    now = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(comparison, "time", now)
    rows = made.run()
    assert [row.name for row in rows] == ["broken", "zeros", "xla_gather"]
    assert made.left == [
        "T = 2, uniform: broken",
        "T = 2, uniform: zeros",
        "T = 2, uniform: xla_gather",
        "T = 2, zipf",
    ]


def test_a_baseline_far_from_the_floor_is_timed_once(plan, monkeypatch):
    asked = []
    measure = comparison.timing.measure_step
    monkeypatch.setattr(
        comparison.timing,
        "measure_step",
        lambda *arguments, **keywords: asked.append(keywords) or measure(*arguments, **keywords),
    )
    baseline = plan.candidates[-1]
    small = dataclasses.replace(plan, tokens=(1,), candidates=[baseline])
    [row] = comparison.LayoutComparison(plan=small).run()
    assert asked == [{"far_us": 20 * row.floor_us}]
    assert row.chain_us_spread == 0  # on this CPU it is far


@on_a_cpu
def test_gpu_flow_outlives_a_machine_without_a_gpu(tmp_path, monkeypatch):
    """The GPU's order of work with a made-up ceiling: Mosaic and CUPTI fail, XLA goes through."""
    ceiling = environment.ReadCeiling(3.0, "made up", {"made up": 3.0, "broken": None})
    monkeypatch.setattr(environment, "measure_read_ceiling", lambda: ceiling)
    flags = "--preset=tiny --tokens=1 --layouts=output_major --baselines=xla_gather --repeats=2"
    settings = parse(*flags.split(), f"--out={tmp_path}")
    with (tmp_path / "log").open("w") as log:
        failed = compare_layouts.compare_on_gpu(settings, Console(file=log, width=120), None)
    assert failed.startswith("1 measurement(s) failed")
    layout, baseline = records.read_record(tmp_path / "cpu_tiny.jsonl").rows
    assert layout.error
    assert baseline.ceiling_share > 0
    assert baseline.device_us is None
    assert "CUPTI" in baseline.config["device_us_error"]

    more = dataclasses.replace(settings, device_times=False, layouts=(), tokens=(2,), add=True)
    late = time.monotonic() - 1
    with (tmp_path / "log").open("w") as log:
        left = compare_layouts.compare_on_gpu(more, Console(file=log, width=120), late)
        assert left == "out of time, not measured: T = 2, uniform"
        assert compare_layouts.compare_on_gpu(more, Console(file=log, width=120), None) is None
    # The rows of before are kept, and the table is of this run alone.
    assert [row.tokens for row in records.read_record(tmp_path / "cpu_tiny.jsonl").rows] == [
        1,
        1,
        2,
    ]
    assert "T=1" not in (tmp_path / "log").read_text()


def test_each_format_has_a_run_and_a_record_of_its_own(tmp_path, monkeypatch):
    asked = []

    def run_one(settings, console, deadline):
        name = compare_layouts._named(settings.preset, settings)
        asked.append((name, settings.weights, settings.device_times))
        return f"{name} failed"

    monkeypatch.setattr(compare_layouts, "check_on_cpu", run_one)
    monkeypatch.setattr(compare_layouts, "compare_on_gpu", run_one)
    settings = parse("--preset=tiny", "--weights=bf16,fp8", f"--out={tmp_path}")
    assert compare_layouts.main(settings) == "tiny failed\ntiny_fp8 failed"
    # A profiler slows what is timed after it.
    assert asked == [("tiny", ("bf16",), False), ("tiny_fp8", ("fp8",), True)]


@on_a_cpu
def test_cpu_flow_reads_a_trace_for_the_byte_model_only(tmp_path):
    trace = tmp_path / "t.npz"
    np.savez(trace, expert_ids=np.arange(8)[None] + np.zeros((5, 1), int))
    settings = parse("--layouts=", "--baselines=xla_gather", "--tokens=1,2", f"--out={tmp_path}")
    settings = dataclasses.replace(settings, routing=(f"trace:{trace}",), repeats=2)
    with (tmp_path / "log").open("w") as log:
        assert compare_layouts.check_on_cpu(settings, Console(file=log, width=120), None) is None
    assert records.read_record(tmp_path / "cpu_tiny.jsonl").routings() == ["uniform"]
    log = (tmp_path / "log").read_text()
    assert "8.0" in log
    assert "uniform routing" in log


def test_nothing_left_to_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = parse("--layouts=", "--baselines=vllm", f"--out={tmp_path}")
    with pytest.raises(SystemExit, match="nothing is left to run; baseline vllm is left out: vllm"):
        compare_layouts.check_on_cpu(settings, Console(quiet=True), None)
