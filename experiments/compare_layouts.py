"""Which kernel layout of decode_experts is the fastest at how many tokens, and how near the limit?

    python -m experiments.compare_layouts --preset=qwen3_30b_a3b --tokens=1,2,4,8,16,32,64
    python -m experiments.compare_layouts --routing=uniform,zipf,hotspot --budget_s=540
    python -m experiments.compare_layouts --weights=bf16,fp8 --tokens=1,8,64,128

On a GPU: the error and the time of every layout and baseline at the preset's true shape. On a CPU:
every layout is checked in interpret mode at a tiny shape, plain XLA is timed there, and the bytes
that the true shape needs are printed. Both write a JSONL, row by row, and a PNG; with FP8 weights
their names end in _fp8.
"""

import dataclasses
import functools
import gc
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.bench import candidates, environment, plots, records, routings, script, tables
from experiments.bench.comparison import ComparisonPlan, LayoutComparison
from experiments.bench.inputs import draw_layers
from experiments.bench.script import flag
from experiments.bench.timing import STEPS
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES, WEIGHT_FORMATS, shapes_of

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}

_ACCURACY_CASES = 3
_CHECKED_PRESET = "tiny"
_MOST_CHECKED_TOKENS = 8  # the interpreter takes seconds for more
_CHECKED_TOKENS = (1, 3, 8)
_CHECKED_LAYERS, _CHECKED_STEPS, _CHECKED_CASES = 2, 4, 1
_MODEL_ROUTINGS = 16
# What the byte model divides by: what one H100 80GB HBM3 reached, results/compare_layouts. On a GPU
# the ceiling is measured.
_MODEL_TBPS = 3.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "The layer.", of=SHAPES)
    tokens: tuple[int, ...] = flag(
        (1, 2, 4, 8, 16, 32, 64),
        "Tokens in the batch, as in 1,2,4.",
        least=1,
        needs="whole numbers from 1 up, as in 1,2,4",
    )
    layouts: tuple[str, ...] = flag(
        candidates.LAYOUT_NAMES,
        "Layouts, each with its default config, and modes, with what the tuned table says.",
        of=candidates.LAYOUT_NAMES,
    )
    weights: tuple[str, ...] = flag(
        ("bf16",),
        "Formats of the weights, one after the other.",
        of=WEIGHT_FORMATS,
        needs="a format",
    )
    routing: tuple[str, ...] = flag(
        ("uniform",),
        f"Of {routings.ACCEPTED}; the first at all tokens.",
        needs=routings.ACCEPTED,
    )
    other_tokens: tuple[int, ...] = flag(
        (8, 64), "Of --tokens, where the routings behind the first are timed too.", least=1
    )
    baselines: tuple[str, ...] = flag(
        candidates.BASELINES,
        "Those that cannot run here are left out.",
        of=candidates.BASELINES,
    )
    dtype: str = flag("bf16", "The output's; inputs are bf16.", of=DTYPES)
    repeats: int = flag(
        20,
        "How often each time is taken, at most; the median counts. Fewer where samples agree or "
        "take more than 1.2 s, once where a baseline takes 20 times the floor.",
        least=1,
    )
    seed: int = flag(0, "Of weights, tokens and routings.", least=0)
    device_times: bool = flag(
        True,
        "Take also the sum of each layer's kernels, by CUPTI, for 90 s at most; of the last of "
        "--weights, because a profiler slows what is timed after it.",
    )
    budget_s: float = flag(0.0, "Seconds after which no row is begun; 0 for no limit.", least=0)
    add: bool = flag(False, "Keep the rows of --out's record that this run does not measure.")
    out: pathlib.Path = flag(
        pathlib.Path("out/compare_layouts"), "The folder for JSONL and PNG.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        if not self.layouts and not self.baselines:
            raise ValueError("--layouts and --baselines are both empty; expected at least one name")
        for routing in self.routing:  # so that a trace that does not fit fails before the work
            routings.make_routings(routing, SHAPES[self.preset], T=1, count=1, seed=self.seed)
        script.writable_folder("out", self.out)


def main(settings: Settings) -> str | None:
    """Runs the comparison for the device at hand; returns what failed or was left out."""
    script.make_interpreter_safe()
    console = script.make_console()
    deadline = time.monotonic() + settings.budget_s if settings.budget_s else None
    run_one = compare_on_gpu if jax.default_backend() == "gpu" else check_on_cpu
    problems = []
    for weights in settings.weights:
        last = weights == settings.weights[-1]
        of_one = dataclasses.replace(
            settings, weights=(weights,), device_times=settings.device_times and last
        )
        problems.append(run_one(of_one, console, deadline))
        gc.collect()  # or one format's layers would lie beside the next one's
    return "\n".join(filter(None, problems)) or None


def compare_on_gpu(settings: Settings, console: Console, deadline: float | None) -> str | None:
    """The preset's true shape in the one format of settings.weights, timed with L2 cold."""
    (weights,) = settings.weights
    shapes = shapes_of(settings.preset, weights)
    with script.progress(console) as bar:
        bar.start("read ceiling", 1)
        ceiling = environment.measure_read_ceiling()
        bar.advance("read ceiling")
        for name, tbps in ceiling.all_tbps.items():
            bar.say(f"read of 4 GB, {name}: " + (f"{tbps:.3f} TB/s" if tbps else "failed"))
        layouts = candidates.make_layouts(
            settings.layouts, shapes, DTYPES[settings.dtype], interpret=False
        )
        bar.say(f"drawing the weights in {weights}")
        layers = draw_layers(shapes, settings.seed)
        plan = _plan(
            settings,
            shapes,
            bar,
            layouts,
            layers=layers,
            ceiling_tbps=ceiling.tbps,
            deadline=deadline,
        )
        preset = _named(settings.preset, settings)
        comparison = _run(settings, preset, plan, bar)
        if settings.device_times:
            bar.start("device times", sum(row.chain_us is not None for row in comparison.rows))
            comparison.run_device_times()
    console.print(
        f"{len(layers)} layers in rotation, {STEPS} steps a program, each with its own routing; "
        f"read ceiling by {ceiling.by}",
        highlight=False,
    )
    return _finish(settings, preset, comparison, console)


def check_on_cpu(settings: Settings, console: Console, deadline: float | None) -> str | None:
    """Without a GPU: layouts in interpret mode, plain XLA timed, bytes modelled; of one format."""
    (weights,) = settings.weights
    shapes = shapes_of(_CHECKED_PRESET, weights)
    # A trace is of one model's experts; the tiny layer has others.
    routing = settings.routing[0] if settings.routing[0] in routings.MADE_UP else "uniform"
    tokens = tuple(T for T in settings.tokens if T <= _MOST_CHECKED_TOKENS) or _CHECKED_TOKENS
    console.print(
        f"No GPU here. Checked instead: every layout in interpret mode at the {_CHECKED_PRESET} "
        f"shape (E={shapes.E} K={shapes.K} H={shapes.H} I={shapes.I}), "
        f"T = {', '.join(map(str, tokens))}, {routing} routing.\n"
        "Interpret mode runs the kernels' arithmetic and not their speed: its times mean nothing "
        "and none is shown.\nThe times below are plain XLA's on this CPU, at the tiny shape.",
        highlight=False,
    )
    with script.progress(console) as bar:
        layouts = candidates.make_layouts(
            settings.layouts, shapes, DTYPES[settings.dtype], interpret=True
        )
        plan = _plan(
            dataclasses.replace(settings, tokens=tokens, routing=(routing,)),
            shapes,
            bar,
            layouts,
            layers=draw_layers(shapes, settings.seed, _CHECKED_LAYERS),
            ceiling_tbps=None,
            deadline=deadline,
            num_steps=_CHECKED_STEPS,
            num_cases=_CHECKED_CASES,
        )
        preset = _named(_CHECKED_PRESET, settings)
        comparison = _run(settings, preset, plan, bar)
    console.print(_byte_model(settings))
    return _finish(settings, preset, comparison, console)


def _plan(
    settings: Settings,
    shapes: ExpertShapes,
    bar: script.Progress,
    layouts: list[candidates.Candidate],
    *,
    layers,
    ceiling_tbps: float | None,
    deadline: float | None,
    num_steps: int = STEPS,
    num_cases: int = _ACCURACY_CASES,
) -> ComparisonPlan:
    out_dtype = DTYPES[settings.dtype]
    baselines, left_out = candidates.make_baselines(settings.baselines, out_dtype, shapes.weights)
    for line in left_out:
        bar.say(line)
    if not layouts and not baselines:
        sys.exit(f"compare_layouts: nothing is left to run; {'; '.join(left_out)}")
    return ComparisonPlan(
        run=environment.describe(
            seed=settings.seed,
            repeats=settings.repeats,
            commit=settings.commit,
            read_ceiling_tbps=ceiling_tbps,
        ),
        shapes=shapes,
        tokens=sorted(settings.tokens),
        routings=settings.routing,
        other_tokens=settings.other_tokens,
        dtype=settings.dtype,
        out_dtype=out_dtype,
        layers=layers,
        candidates=[*layouts, *baselines],
        num_steps=num_steps,
        num_cases=num_cases,
        deadline=deadline,
    )


def _run(
    settings: Settings, preset: str, plan: ComparisonPlan, bar: script.Progress
) -> LayoutComparison:
    """Runs it; each row is in the file as soon as it is measured."""
    path = _path(settings, preset, plan.run.device)
    before = records.begin_record(path, preset, records.KINDS, add=settings.add)
    comparison = LayoutComparison(
        plan=plan,
        say=bar.say,
        advance=bar.advance,
        save=lambda rows: records.write_record(path, before.updated(rows)),
    )
    bar.start("chains", len(list(plan.pairs())) * len(plan.candidates))
    comparison.run()
    return comparison


def _named(preset: str, settings: Settings) -> str:
    """The record's name: the preset, and the format of its weights where that is not bf16."""
    (weights,) = settings.weights
    return preset if weights == "bf16" else f"{preset}_{weights}"


def _path(settings: Settings, preset: str, device: str) -> pathlib.Path:
    return settings.out / f"{device}_{preset}.jsonl"


def _finish(
    settings: Settings, preset: str, comparison: LayoutComparison, console: Console
) -> str | None:
    """Prints this run's table, draws the record's picture; says what failed or was left out."""
    device = comparison.plan.run.device
    path = _path(settings, preset, device)
    if comparison.rows:
        tables.print_record(
            console, records.Record(preset=preset, rows=comparison.rows), settings.dtype
        )
        picture = path.with_suffix(".png")
        plots.draw(picture, records.read_record(path), records.measured_elsewhere(device, preset))
        console.print(f"Wrote {path} and {picture}", highlight=False, soft_wrap=True)
    problems = []
    if failed := sum(bool(row.error) for row in comparison.rows):
        problems.append(
            f"{failed} measurement(s) failed; the table and the JSONL say which and why"
        )
    if comparison.left:
        problems.append(f"out of time, not measured: {'; '.join(comparison.left)}")
    return "\n".join(problems) or None


def _byte_model(settings: Settings) -> Table:
    """What the asked preset's weights cost to read on a GPU, for each asked number of tokens."""
    (weights,) = settings.weights
    shapes, routing = shapes_of(settings.preset, weights), settings.routing[0]
    table = Table(
        title=f"{settings.preset}, {routing} routing: bytes of {weights} expert weights of one "
        f"layer (E={shapes.E} K={shapes.K} H={shapes.H} I={shapes.I}, "
        f"{routings.expert_bytes(shapes) / 1e6:.2f} MB an expert)",
        title_justify="left",
    )
    titles = ["tokens T", "unique experts", "unique MB", "requested MB", "requested / unique"]
    for title in (*titles, f"floor at {_MODEL_TBPS} TB/s, us"):
        table.add_column(title, justify="right")
    for T in settings.tokens:
        drawn = routings.make_routings(routing, shapes, T, _MODEL_ROUTINGS, settings.seed)
        traffic = routings.traffic(drawn, shapes)
        table.add_row(
            str(T),
            f"{traffic.unique_experts:.1f}",
            f"{traffic.unique_bytes / 1e6:.0f}",
            f"{traffic.requested_bytes / 1e6:.0f}",
            f"{traffic.requested_bytes / traffic.unique_bytes:.2f}",
            f"{routings.floor_us(traffic.unique_bytes, _MODEL_TBPS):.1f}",
        )
    return table


run = functools.partial(script.run, Settings, main)

if __name__ == "__main__":
    run()
