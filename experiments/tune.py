"""Which layout and config of decode_experts are the fastest on this device? Writes the tuned table.

    python -m experiments.tune --preset=qwen3_30b_a3b --tokens=1,8,64
    python -m experiments.tune --preset=qwen3_30b_a3b --weights=bf16,fp8
    python -m experiments.tune --preset=qwen3_235b_a22b,qwen3_coder_480b --tokens=1,8,64 \
        --expert_shards=2,4,8 --tensor_shards=2,4,8 --budget_s=540

The second one stops cleanly after nine minutes; the same command then goes on where it stopped. On
a machine without a GPU, --interpret checks the machinery at a tiny shape and measures nothing.

A shard's layer is what one device of several sees:
  tensor shard 1/n   every expert's I / n neurons: all tokens, all experts, a narrower I
  expert shard 1/n   E / n whole experts: all tokens and all K ids of each, but ids of other shards'
                     experts are padding, so that a token has K / n experts here on average
"""

import dataclasses
import functools
import gc
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import rich.table
from rich.console import Console

from experiments.bench import environment, routings, script
from experiments.bench.candidates import configs_to_tune, default_config
from experiments.bench.script import flag
from experiments.bench.tuning_bench import Layer, LayerBench
from experiments.bench.tuning_store import Store
from experiments.bench.tuning_sweep import Bench, OutOfTime, Sweep
from pallas_kernels.block_scaled_fp8 import BLOCK
from pallas_kernels.decode_experts import LAYOUTS, tuned_tables
from pallas_kernels.decode_experts.api import SIZE_MULTIPLE
from pallas_kernels.decode_experts.shapes import SHAPES, WEIGHT_FORMATS, shapes_of
from pallas_kernels.decode_experts.tuned_tables import BUCKETS, Entry, Table

INTERPRETED_PRESET = "tiny"
_INTERPRETED_TOKENS = 8  # the interpreter takes long for more
# One user, a small batch, a full one; then what lies between.
_USEFUL_FIRST = (1, 8, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: tuple[str, ...] = flag(("qwen3_30b_a3b",), "Layers.", of=SHAPES, needs="a layer")
    tokens: tuple[int, ...] = flag(
        BUCKETS, "Of the table's buckets.", of=BUCKETS, needs=f"some of {BUCKETS}"
    )
    layouts: tuple[str, ...] = flag(tuple(LAYOUTS), "Layouts.", of=LAYOUTS, needs="a layout")
    weights: tuple[str, ...] = flag(
        ("bf16",), "Formats of the weights.", of=WEIGHT_FORMATS, needs="a format"
    )
    expert_shards: tuple[int, ...] = flag((), "Also shards of E / n experts, as 2,4,8.", least=2)
    tensor_shards: tuple[int, ...] = flag((), "Also shards of I / n neurons, as 2,4,8.", least=2)
    most_configs: int = flag(0, "Of each layout; 0 for all of its candidates.", least=0)
    routing: str = flag("uniform", f"{routings.ACCEPTED}.")
    rounds: int = flag(5, "How often each candidate is timed, all of them in each round.", least=1)
    repeats: int = flag(7, "How many samples a round takes of each, at most.", least=1)
    seed: int = flag(0, "Of weights, tokens and routings.", least=0)
    budget_s: float = flag(0.0, "Seconds after which it stops; 0 for no limit.", least=0)
    compile_threads: int = flag(4, "How many candidates are compiled at once.", least=1)
    again: bool = flag(False, "Measure anew what the table has already.")
    interpret: bool = flag(False, "Check the machinery without a GPU, at a tiny shape.")
    out: pathlib.Path | None = flag(
        None, "The table's folder; empty for the op's data folder (out/tune with --interpret)."
    )
    records: pathlib.Path = flag(
        pathlib.Path("out/tune"), "The folder for a line about each candidate.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        for name in self.presets:  # so that a trace that does not fit fails before the work
            routings.make_routings(self.routing, SHAPES[name], T=1, count=1, seed=self.seed)
        self.layers()
        for name, folder in (("out", self.table_folder), ("records", self.records)):
            if self.interpret and folder.resolve().is_relative_to(tuned_tables.FOLDER.resolve()):
                raise ValueError(
                    f"--{name} is {str(folder)!r}; expected another folder than the shipped "
                    "tables' with --interpret, whose times mean nothing"
                )
            script.writable_folder(name, folder)

    @property
    def presets(self) -> tuple[str, ...]:
        return (INTERPRETED_PRESET,) if self.interpret else self.preset

    @property
    def table_folder(self) -> pathlib.Path:
        if self.out is not None:
            return self.out
        return pathlib.Path("out/tune") if self.interpret else tuned_tables.FOLDER

    def batches(self) -> list[int]:
        """The numbers of tokens, the most useful first."""
        tokens = self.tokens
        if self.interpret:
            tokens = [T for T in tokens if T <= _INTERPRETED_TOKENS] or [1]
        order = [*_USEFUL_FIRST, *(T for T in BUCKETS if T not in _USEFUL_FIRST)]
        return [T for T in order if T in tokens]

    def layers(self) -> list[Layer]:
        """The presets' layers, then their shards.

        Raises:
          ValueError: a layer cannot be cut so; names the flag and what is accepted.
        """
        whole = [
            Layer(name, shapes_of(name, weights), SHAPES[name].E)
            for weights in self.weights
            for name in self.presets
        ]
        layers = list(whole)
        for layer in whole:
            layers += [_expert_shard(layer, n) for n in self.expert_shards]
            layers += [_tensor_shard(layer, n) for n in self.tensor_shards]
        return layers


def _expert_shard(whole: Layer, n: int) -> Layer:
    preset, shapes = whole.of, whole.shapes
    if shapes.E % n or shapes.E // n < shapes.K:
        raise ValueError(
            f"--expert_shards has {n}: E = {shapes.E} of {preset} makes shards of "
            f"{shapes.E / n:g} experts; expected a whole number, at least K = {shapes.K}"
        )
    return Layer(
        f"{preset}, expert shard 1/{n}", dataclasses.replace(shapes, E=shapes.E // n), shapes.E
    )


def _tensor_shard(whole: Layer, n: int) -> Layer:
    preset, shapes = whole.of, whole.shapes
    multiple = SIZE_MULTIPLE if shapes.weights == "bf16" else BLOCK[0]
    if shapes.I % n or shapes.I // n % multiple:
        raise ValueError(
            f"--tensor_shards has {n}: I = {shapes.I} of {preset} makes shards of "
            f"{shapes.I / n:g} neurons; expected a multiple of {multiple}"
        )
    return Layer(
        f"{preset}, tensor shard 1/{n}", dataclasses.replace(shapes, I=shapes.I // n), shapes.E
    )


def main(settings: Settings) -> str | None:
    """Tunes and prints the table; returns what of it is missing."""
    start = time.monotonic()
    if settings.interpret:
        jax.config.update("jax_platforms", "cpu")
        script.make_interpreter_safe()
    elif jax.default_backend() != "gpu":
        sys.exit(
            f"tune: it measures, and JAX's backend here is {jax.default_backend()!r}; it needs an "
            "NVIDIA GPU of the Hopper generation (H100, H200) and jax[cuda13]. --interpret checks "
            "the machinery without one"
        )
    console = script.make_console(width=160)
    deadline = start + settings.budget_s if settings.budget_s else None
    missing = tune(settings, console, deadline)
    return "not measured: " + "; ".join(missing) if missing else None


def tune(settings: Settings, console: Console, deadline: float | None) -> list[str]:
    """Runs it on the device at hand; returns lines about what is missing."""
    with script.progress(console) as bar:
        ceiling = None if settings.interpret else environment.measure_read_ceiling().tbps
        seen = environment.describe(
            seed=settings.seed,
            repeats=settings.repeats,
            commit=settings.commit,
            read_ceiling_tbps=ceiling,
        )
        run = {k: v for k, v in dataclasses.asdict(seen).items() if k != "device"}
        run |= {
            "routing": settings.routing,
            "rounds": settings.rounds,
            "interpreted": settings.interpret,
        }
        try:
            store = Store(settings.table_folder, settings.records, seen.device_kind, run, bar.say)
        except ValueError as error:
            sys.exit(f"tune: {error}")

        def bench_of(layer: Layer) -> LayerBench:
            return LayerBench(
                layer,
                routing=settings.routing,
                seed=settings.seed,
                repeats=settings.repeats,
                interpret=settings.interpret,
                say=bar.say,
            )

        missing = fill(settings, store, bench_of, bar, deadline)
    console.print(summary(store.table()))
    console.print(f"{store.path} and {store.records_path}", highlight=False, soft_wrap=True)
    tuned_tables.forget()
    return missing


def fill(
    settings: Settings,
    store: Store,
    bench_of: Callable[[Layer], Bench],
    bar: script.Progress,
    deadline: float | None,
) -> list[str]:
    """Goes through layers and numbers of tokens; the store is written after each sweep.

    Args:
      settings: what to tune.
      store: what is there already is left alone, unless settings.again.
      bench_of: makes a layer's weights.
      bar: shows how far it is.
      deadline: a time.monotonic(), None for none.

    Returns:
      Lines about what was not measured: out of time, or no candidate came through.
    """
    missing: list[str] = []
    for layer in settings.layers():
        bench = None
        for T in settings.batches():
            name = f"{_named(layer)}, T = {T}"
            if store.has(layer.shapes, T) and not settings.again:
                bar.say(f"{name}: in the table already")
                continue
            if deadline is not None and time.monotonic() > deadline:
                missing.append(f"{name}: out of time")
                continue
            if bench is None:
                gc.collect()  # the layer before this one, or its weights would lie beside these
                bench = bench_of(layer)
            try:
                found = _sweep(settings, layer, T, bench, store, bar, deadline)
            except OutOfTime:
                missing.append(f"{name}: out of time")
                continue
            if not found:
                missing.append(f"{name}: no candidate came through")
    return missing


def _named(layer: Layer) -> str:
    return layer.of if layer.shapes.weights == "bf16" else f"{layer.of} in {layer.shapes.weights}"


def _sweep(settings, layer: Layer, T: int, bench: Bench, store: Store, bar, deadline) -> bool:
    """One layer at T tokens, into the store; whether any candidate came through.

    A function of its own, so that nothing of a sweep outlives it: its trials hold on to weights.
    """
    asked = configs_to_tune(settings.layouts, layer.shapes, T, settings.most_configs or None)
    # The defaults and the other configs have a first round each; two orders of sums are checked.
    bar.start(f"{_named(layer)}, T = {T}", len(asked) + settings.rounds + 3)
    begun = time.monotonic()
    sweep = Sweep(
        bench.at(T),
        threads=settings.compile_threads,
        deadline=deadline,
        say=bar.say,
        advance=bar.advance,
    )
    measured = sweep.run(asked, settings.rounds)
    store.add(layer, T, measured, sweep.dropped)
    if measured:
        best = min(measured, key=lambda m: m.us)
        bar.say(
            f"{_named(layer)}, T = {T}: {best.us:.1f} us by {best.candidate}; "
            f"{len(measured)} of {len(asked)} candidates timed, {len(sweep.dropped)} dropped, "
            f"{time.monotonic() - begun:.0f} s"
        )
    return bool(measured)


def summary(table: Table) -> rich.table.Table:
    """Each layer and T: what "auto" and "invariant" take there, and how long it takes."""
    shown = rich.table.Table(
        title=f"{table.device_kind}, jax {table.jax}: microseconds of a layer, L2 cold",
        title_justify="left",
    )
    for title in ("layer", "weights", "T", "auto", "us", "invariant", "us", "relative error"):
        right = title in ("T", "us", "relative error")
        shown.add_column(title, justify="right" if right else "left")
    invariant = {(entry.shapes, entry.T): entry for entry in table.invariant}
    before = None
    ordered = sorted(table.fastest, key=lambda e: (e.of, dataclasses.astuple(e.shapes), e.T))
    for entry in ordered:
        same = invariant.get((entry.shapes, entry.T))
        shown.add_row(
            entry.of if entry.shapes != before else "",
            entry.shapes.weights if entry.shapes != before else "",
            str(entry.T),
            _in_short(entry),
            f"{entry.us:.1f}",
            _in_short(same) if same else "-",
            f"{same.us:.1f}" if same else "-",
            f"{entry.rel_error:.2e}",
        )
        before = entry.shapes
    return shown


def _in_short(entry: Entry) -> str:
    """The layout, and what differs from its default."""
    default = dataclasses.asdict(default_config(entry.layout, entry.shapes, entry.T))
    found = dataclasses.asdict(entry.config)
    changes = [f"{name}={value}" for name, value in found.items() if value != default[name]]
    return " ".join([entry.layout, *changes])


run = functools.partial(script.run, Settings, main)

if __name__ == "__main__":
    run()
