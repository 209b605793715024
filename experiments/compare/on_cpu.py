"""compare_layouts without a GPU: layouts in interpret mode, plain XLA timed, bytes modelled."""

import jax
from rich.console import Console
from rich.table import Table

from experiments.compare import byte_model, candidates, layers, output, run
from experiments.compare.environment import describe
from experiments.compare.routings import MADE_UP, make_routings
from experiments.compare.settings import Settings
from pallas_kernels.decode_experts.shapes import SHAPES

_CHECKED_PRESET = "tiny"
_MOST_TOKENS = 8  # the interpreter takes seconds for more
_TOKENS = (1, 3, 8)
_LAYERS = 2
_STEPS = 4
_ACCURACY_ROUTINGS = 1
_MODEL_ROUTINGS = 16
# What the byte model divides by: what one H100 80GB HBM3 reached, results/compare_layouts. On a GPU
# the ceiling is measured.
_MODEL_TBPS = 3.2


def compare(settings: Settings, console: Console) -> int:
    """Runs everything, prints the tables, writes the JSONL and the PNG; returns how many failed."""
    shapes = SHAPES[_CHECKED_PRESET]
    tokens = tuple(T for T in settings.tokens if T <= _MOST_TOKENS) or _TOKENS
    # A trace is of one model's experts; the tiny layer has others.
    routing = settings.routing if settings.routing in MADE_UP else "uniform"
    environment = describe(
        seed=settings.seed,
        repeats=settings.repeats,
        commit=settings.commit,
        read_ceiling_tbps=None,
    )
    layouts = candidates.make_layouts(settings.layouts, shapes, settings.out_dtype, interpret=True)
    baselines, left_out = candidates.make_baselines(settings.baselines, settings.out_dtype)
    console.print(
        f"No GPU here. Checked instead: every layout in interpret mode at the {_CHECKED_PRESET} "
        f"shape (E={shapes.E} K={shapes.K} H={shapes.H} I={shapes.I}), "
        f"T = {', '.join(map(str, tokens))}, {routing} routing.\n"
        "Interpret mode runs the kernels' arithmetic and not their speed: its times mean nothing "
        "and none is shown.\nThe times below are plain XLA's on this CPU, at the tiny shape.",
        highlight=False,
    )
    for line in left_out:
        console.print(line, highlight=False)
    keys = jax.random.split(jax.random.key(settings.seed), _LAYERS)
    plan = run.Plan(
        settings=settings,
        preset=_CHECKED_PRESET,
        shapes=shapes,
        tokens=tokens,
        routing=routing,
        layers=[layers.make_layer(key, shapes) for key in keys],
        candidates=candidates.expect_some([*layouts, *baselines], left_out),
        steps=_STEPS,
        accuracy_routings=_ACCURACY_ROUTINGS,
        ceiling_tbps=None,
    )
    path = settings.result_path(environment.device, _CHECKED_PRESET, routing, ".jsonl")
    with output.progress(console) as bar:
        bar.start("candidates", len(tokens) * len(plan.candidates))
        save = output.saver(path, environment)
        measurements = run.run(plan, bar.advance, bar.say, save)
    _print_byte_model(settings, console)
    return output.finish(console, path, environment, measurements)


def _print_byte_model(settings: Settings, console: Console) -> None:
    """What the asked preset's weights cost to read on a GPU, for each asked number of tokens."""
    shapes = settings.shapes
    table = Table(
        title=f"{settings.preset}, {settings.routing} routing: bytes of bf16 expert weights of one "
        f"layer (E={shapes.E} K={shapes.K} H={shapes.H} I={shapes.I}, "
        f"{byte_model.expert_bytes(shapes) / 1e6:.2f} MB an expert)",
        title_justify="left",
    )
    titles = ["tokens T", "unique experts", "unique MB", "requested MB", "requested / unique"]
    for title in (*titles, f"floor at {_MODEL_TBPS} TB/s, us"):
        table.add_column(title, justify="right")
    for T in settings.tokens:
        routings = make_routings(settings.routing, shapes, T, _MODEL_ROUTINGS, settings.seed)
        traffic = byte_model.traffic(routings, shapes)
        table.add_row(
            str(T),
            f"{traffic.unique_experts:.1f}",
            f"{traffic.unique_bytes / 1e6:.0f}",
            f"{traffic.requested_bytes / 1e6:.0f}",
            f"{traffic.requested_bytes / traffic.unique_bytes:.2f}",
            f"{byte_model.floor_us(traffic.unique_bytes, _MODEL_TBPS):.1f}",
        )
    console.print(table)
