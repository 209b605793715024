"""Which layout and config of decode_experts are the fastest on this device? Writes the tuned table.

    python -m experiments.tune --preset=qwen3_30b_a3b --tokens=1,8,64
    python -m experiments.tune --preset=qwen3_235b_a22b,qwen3_coder_480b --tokens=1,8,64 \
        --expert_shards=2,4,8 --tensor_shards=2,4,8 --budget_s=540

The second one stops cleanly after nine minutes; the same command then goes on where it stopped. On
a machine without a GPU, --interpret checks the machinery at a tiny shape and measures nothing.
"""

import dataclasses
import functools
import os
import sys
import time

from absl import app, flags

# JAX takes three quarters of a GPU's memory by default; the largest preset needs more. This is read
# when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
from rich.console import Console

from experiments.compare import output, read_ceiling
from experiments.compare.environment import describe
from experiments.compare.routings import ACCEPTED
from experiments.tuning import report, run, settings
from experiments.tuning.bench import Bench, make_weights
from experiments.tuning.store import Store
from pallas_kernels.decode_experts import LAYOUTS, tuned_tables
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.tuned_tables import BUCKETS

_BUCKETS = ",".join(map(str, BUCKETS))
_FLAGS = (
    flags.DEFINE_list("preset", "qwen3_30b_a3b", f"Layers: {', '.join(SHAPES)}."),
    flags.DEFINE_list("tokens", _BUCKETS, f"Of the table's buckets {_BUCKETS}."),
    flags.DEFINE_list("layouts", ",".join(LAYOUTS), f"Of {', '.join(LAYOUTS)}."),
    flags.DEFINE_list("expert_shards", "", "Also shards of E / n experts, as in 2,4,8."),
    flags.DEFINE_list("tensor_shards", "", "Also shards of I / n neurons, as in 2,4,8."),
    flags.DEFINE_integer("most_configs", 0, "Of each layout; 0 for all of its candidates."),
    flags.DEFINE_string("routing", "uniform", f"{ACCEPTED}."),
    flags.DEFINE_integer("rounds", 5, "How often each candidate is timed, by turns."),
    flags.DEFINE_integer("repeats", 7, "How many samples a round takes of each, at most."),
    flags.DEFINE_integer("seed", 0, "Of weights, tokens and routings."),
    flags.DEFINE_float("budget_s", 0, "Seconds after which it stops; 0 for no limit."),
    flags.DEFINE_integer("compile_threads", 4, "How many candidates are compiled at once."),
    flags.DEFINE_bool("again", False, "Measure anew what the table has already."),
    flags.DEFINE_bool("interpret", False, "Check the machinery without a GPU, at a tiny shape."),
    flags.DEFINE_string(
        "out", "", "The table's folder; empty for the op's data folder (out/tune with --interpret)."
    ),
    flags.DEFINE_string(
        "records", settings.DEFAULT_RECORDS, "The folder for a line about each candidate."
    ),
    flags.DEFINE_string("commit", "", "The commit to record where there is no git checkout."),
)


def main(argv: list[str]) -> None:
    """Checks the flags, tunes, prints the table; exits 1 if some of it is missing."""
    start = time.monotonic()
    if len(argv) > 1:
        sys.exit(f"tune takes flags only; left over: {' '.join(argv[1:])}")
    try:
        asked = settings.parse(**{flag.name: flag.value for flag in _FLAGS})
    except ValueError as error:
        sys.exit(f"tune: {error}")
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut off leaves its lines
    if asked.interpret:
        jax.config.update("jax_platforms", "cpu")
        # Or Pallas's interpreter can hang; read when the CPU client is made.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    elif jax.default_backend() != "gpu":
        sys.exit(
            f"tune: it measures, and JAX's backend here is {jax.default_backend()!r}; it needs an "
            "NVIDIA GPU of the Hopper generation (H100, H200) and jax[cuda13]. --interpret checks "
            "the machinery without one"
        )
    # A pipe or a log file is not 80 columns wide just because it says nothing about its width.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    deadline = None if asked.budget_s is None else start + asked.budget_s
    missing = tune(asked, console, deadline)
    if missing:
        sys.exit("not measured: " + "; ".join(missing))


def tune(asked: settings.Settings, console: Console, deadline: float | None) -> list[str]:
    """Runs it on the device at hand; returns lines about what is missing."""
    with output.progress(console) as bar:
        ceiling = None if asked.interpret else read_ceiling.measure().tbps
        environment = describe(
            seed=asked.seed,
            repeats=asked.repeats,
            commit=asked.commit,
            read_ceiling_tbps=ceiling,
        )
        record = {
            name: value
            for name, value in dataclasses.asdict(environment).items()
            if name not in ("kind", "device")
        } | {"routing": asked.routing, "rounds": asked.rounds, "interpreted": asked.interpret}
        try:
            store = Store(asked.out, asked.records, environment.device_kind, record, bar.say)
        except ValueError as error:
            sys.exit(f"tune: {error}")
        missing = run.tune(asked, store, bench_of(asked, bar.say), bar, deadline)
    console.print(report.make(store.table()))
    console.print(f"{store.path} and {store.records_path}", highlight=False, soft_wrap=True)
    tuned_tables.forget()
    return missing


def bench_of(asked: settings.Settings, say):
    """See run.tune."""

    def of_layer(layer):
        weights = make_weights(layer, asked.seed, asked.interpret)

        return functools.partial(
            Bench,
            layer,
            weights,
            routing=asked.routing,
            seed=asked.seed,
            repeats=asked.repeats,
            interpret=asked.interpret,
            say=say,
        )

    return of_layer


if __name__ == "__main__":
    app.run(main)
