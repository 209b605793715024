"""Which kernel layout of decode_experts is the fastest at how many tokens, and how near the limit?

    python -m experiments.compare_layouts --preset=qwen3_30b_a3b --tokens=1,2,4,8,16,32,64

On a GPU: the error and the time of every layout and baseline at the preset's true shape. On a CPU:
every layout is checked in interpret mode at a tiny shape, plain XLA is timed there, and the bytes
that the true shape needs are printed. Both write a JSONL and a PNG.
"""

import os
import sys

from absl import app, flags

# JAX takes three quarters of a GPU's memory by default; the largest preset needs more. This is read
# when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
from rich.console import Console

from experiments.compare import candidates, on_cpu, on_gpu, settings
from experiments.compare.routings import ACCEPTED
from pallas_kernels.decode_experts import LAYOUTS, MODES
from pallas_kernels.decode_experts.shapes import SHAPES

_PRESET = flags.DEFINE_string("preset", "qwen3_30b_a3b", f"The layer: {', '.join(SHAPES)}.")
_TOKENS = flags.DEFINE_list("tokens", "1,2,4,8,16,32,64", "Tokens in the batch, as in 1,2,4.")
_LAYOUTS = flags.DEFINE_list(
    "layouts",
    ",".join(LAYOUTS),
    f"Of {', '.join(LAYOUTS)}, each with its default config, and {', '.join(MODES)}, with what the "
    "tuned table says.",
)
_ROUTING = flags.DEFINE_string("routing", "uniform", f"{ACCEPTED}.")
_BASELINES = flags.DEFINE_list(
    "baselines",
    ",".join(candidates.BASELINES),
    f"Of {', '.join(candidates.BASELINES)}; those that cannot run here are left out.",
)
_DTYPE = flags.DEFINE_string(
    "dtype", "bf16", f"The output's: {', '.join(settings.DTYPES)}. Inputs and weights are bf16."
)
_REPEATS = flags.DEFINE_integer(
    "repeats",
    20,
    "How often each time is taken; the median counts. At least 3, and fewer than asked for where a "
    "candidate would take more than 1.2 s.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, tokens and routings.")
_DEVICE_TIMES = flags.DEFINE_boolean(
    "device_times", True, "Take also the sum of each layer's kernels, by CUPTI, for 90 s at most."
)
_OUT = flags.DEFINE_string("out", "out/compare_layouts", "The folder for the JSONL and the PNG.")
_COMMIT = flags.DEFINE_string("commit", "", "The commit to record where there is no git checkout.")


def main(argv: list[str]) -> None:
    """Checks the flags, runs the comparison for the device at hand, exits 1 if anything failed."""
    if len(argv) > 1:
        sys.exit(f"compare_layouts takes flags only; left over: {' '.join(argv[1:])}")
    try:
        asked = settings.parse(
            preset=_PRESET.value,
            tokens=_TOKENS.value,
            layouts=_LAYOUTS.value,
            routing=_ROUTING.value,
            baselines=_BASELINES.value,
            dtype=_DTYPE.value,
            repeats=_REPEATS.value,
            seed=_SEED.value,
            device_times=_DEVICE_TIMES.value,
            out=_OUT.value,
            commit=_COMMIT.value,
        )
    except ValueError as error:
        sys.exit(f"compare_layouts: {error}")
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut off leaves its lines
    # Or Pallas's interpreter can hang; read when the CPU client is made.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # A pipe or a log file is not 80 columns wide just because it says nothing about its width.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    where = on_gpu if jax.default_backend() == "gpu" else on_cpu
    failures = where.compare(asked, console)
    if failures:
        sys.exit(f"{failures} measurement(s) failed; the table and the JSONL say which and why")


if __name__ == "__main__":
    app.run(main)
