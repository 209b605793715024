"""How fast is a whole decode step, and how near the time that reading its bytes takes?

    python -m experiments.decode_speed --preset=qwen3_30b_a3b --batches=1,2,4,8,16,32,64 \
        --contexts=512,4096,16384
    python -m experiments.decode_speed --preset=tiny --batches=1,4 --contexts=64

For each batch and context: milliseconds a step in a chain that never waits for the host, and what
`generate` takes as a user runs it, with the time to the first token. The limit is the bytes of the
very steps timed at this process's read ceiling. The experts of `generate` are counted in a run of
the same tokens that is not timed, so that it has a limit of its own. A context of N tokens is a
cache of random keys and values of which each row has N, and each row and step is given a random
token of its own: see experiments/bench/decode_chain.py. Writes a JSONL, row by row, and a PNG.

--baseline=transformers times the compiled transformers model first, in a process of its own; its
compiling takes a minute or more for each of --baseline_batches.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from experiments import generate as generate_script
from experiments.bench import (
    decode_plots,
    decode_records,
    decode_tables,
    environment,
    records,
    script,
)
from experiments.bench.decode_chain import FEEDS
from experiments.bench.decode_session import DecodePlan, DecodeSession
from experiments.bench.script import flag
from experiments.bench.transformers_child import BaselineError, measure_in_child
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation.arguments import position_limit
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.presets import PRESETS
from moe_jax.quantization import fp8_config

BASELINES = ("none", "transformers")
WEIGHTS = ("bf16", "fp8")
_ON_CPU = "tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes; the weights are random.", of=PRESETS)
    checkpoint: pathlib.Path | None = flag(None, "A checkpoint directory, in place of a preset.")
    weights: str = flag("bf16", "Of a preset's linear layers and experts.", of=WEIGHTS)
    dequantize: bool = flag(False, "Whether an FP8 checkpoint becomes bfloat16.")
    layers: int = flag(0, "Only the model's first ones; 0 for all.", least=0)
    batches: tuple[int, ...] = flag(
        (1, 2, 4, 8, 16, 32, 64), "Rows in the batch.", least=1, needs="as in 1,8"
    )
    contexts: tuple[int, ...] = flag(
        (512, 4096, 16384),
        "Tokens in each row's cache; the first at all batches.",
        least=1,
        needs="as in 512,4096",
    )
    other_batches: tuple[int, ...] = flag(
        (1, 8), "Of --batches, where the contexts behind the first are timed too.", least=1
    )
    steps: int = flag(16, "Of a chain, which are issued at once.", least=1)
    feed: str = flag("given", "The tokens that each step takes.", of=FEEDS)
    experts_backend: str = flag("auto", "Of decode steps.", of=("auto", *EXPERTS_BACKENDS))
    attention_backend: str = flag(
        "auto", "Of the chain; `generate` chooses.", of=("auto", *ATTENTION_BACKENDS)
    )
    generate_batches: tuple[int, ...] = flag(
        (1, 8), "Of --batches, where `generate` is timed too, at the first context.", least=1
    )
    generate_tokens: int = flag(128, "New tokens of each row in `generate`.", least=2)
    repeats: int = flag(7, "Samples of each time, at most; the median counts.", least=1)
    seed: int = flag(0, "Of weights, caches and tokens.", least=0)
    profile: bool = flag(False, "Take each row's kernels too.")
    compile_threads: int = flag(
        1, "Chains made and compiled at once; with more than 1 no compile time is taken.", least=1
    )
    baseline: str = flag("none", "Timed first, where it is installed.", of=BASELINES)
    baseline_batches: tuple[int, ...] = flag(
        (1, 8, 32), "Of --batches, where the baseline is timed, at the first context.", least=1
    )
    add: bool = flag(False, "Keep the rows of --out's record that this run does not measure.")
    out: pathlib.Path = flag(
        pathlib.Path("out/decode_speed"), "The folder for JSONL and PNG.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        if self.checkpoint is not None and self.weights != "bf16":
            raise ValueError(
                f"--weights is {self.weights!r} with --checkpoint, which has its own; expected it "
                "with --preset"
            )
        if self.checkpoint is None:
            if self.dequantize:
                raise ValueError("--dequantize is given without --checkpoint; expected both")
            config = PRESETS[self.preset]
            if self.layers > config.num_hidden_layers:
                raise ValueError(
                    f"--layers is {self.layers}; expected 0 to {config.num_hidden_layers}"
                )
            if max(self.batches) > config.vocab_size:
                raise ValueError(
                    f"--batches has {max(self.batches)}; expected at most {config.vocab_size}"
                )
            limit = position_limit(config)
            longest = max(self.contexts) + self.steps
            if limit is not None and longest > limit:
                raise ValueError(
                    f"--contexts has {max(self.contexts)} and --steps is {self.steps}; expected at "
                    f"most {limit} together"
                )
        elif not self.checkpoint.is_dir():
            raise ValueError(f"--checkpoint is {str(self.checkpoint)!r}; expected a directory")
        script.writable_folder("out", self.out)

    @property
    def name(self) -> str:
        """The model's, in the record and the file's name."""
        name = self.preset if self.checkpoint is None else self.checkpoint.resolve().name
        name += {"bf16": "", "fp8": "_fp8"}[self.weights] + "_dequantized" * self.dequantize
        return f"{name}_{self.layers}_layers" if self.layers else name

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Each batch and context, in the order in which they run."""
        for context in self.contexts:
            for B in sorted(self.batches):
                if context == self.contexts[0] or B in self.other_batches:
                    yield B, context

    def pairs_of(self, batches: tuple[int, ...]) -> list[tuple[int, int]]:
        """Those of the first context in `batches`."""
        return [
            (B, context)
            for B, context in self.pairs()
            if context == self.contexts[0] and B in batches
        ]


def main(settings: Settings) -> str | None:
    """Measures everything; returns what failed."""
    logging.set_verbosity(logging.WARNING)
    console = script.make_console(width=170)
    problems: list[str] = []
    with script.progress(console) as bar:
        # Before JAX takes any of the GPU's memory.
        others = _measure_baseline(settings, bar, problems)
        settings = _fitted_to_device(settings, bar)
        ceiling_tbps = _measure_ceiling(bar) if jax.default_backend() == "gpu" else None
        plan = _plan(settings, ceiling_tbps)
        path = settings.out / f"{plan.run.device}_{settings.name}.jsonl"
        before = records.begin_record(path, settings.name, decode_records.KINDS, add=settings.add)
        session = DecodeSession(
            plan=plan,
            say=bar.say,
            advance=bar.advance,
            save=lambda rows: records.write_record(path, before.updated(rows)),
        )
        session.take_baseline(others)
        begun = time.perf_counter()
        model = make_model(settings)
        jax.block_until_ready(to_arrays(model))
        bar.say(f"the model is there after {time.perf_counter() - begun:.1f} s")
        bar.start("decode steps", len(plan.pairs) + len(plan.generate_pairs))
        session.run(model)
    decode_tables.print_record(console, records.Record(preset=settings.name, rows=session.rows))
    picture = path.with_suffix(".png")
    decode_plots.draw(picture, decode_records.read_record(path))
    console.print(f"Wrote {path} and {picture}", highlight=False, soft_wrap=True)
    problems += decode_tables.failures(session.rows)
    return "\n".join(problems) or None


def _plan(settings: Settings, ceiling_tbps: float | None) -> DecodePlan:
    return DecodePlan(
        run=environment.describe(
            seed=settings.seed,
            repeats=settings.repeats,
            commit=settings.commit,
            read_ceiling_tbps=ceiling_tbps,
        ),
        pairs=list(settings.pairs()),
        generate_pairs=settings.pairs_of(settings.generate_batches),
        steps=settings.steps,
        feed=settings.feed,
        experts_backend=settings.experts_backend,
        attention_backend=settings.attention_backend,
        generate_tokens=settings.generate_tokens,
        repeats=settings.repeats,
        profile=settings.profile,
        compile_threads=settings.compile_threads,
    )


def _fitted_to_device(settings: Settings, bar: script.Progress) -> Settings:
    """As asked on a GPU; without one a preset is the tiny one, at contexts that it has."""
    if jax.default_backend() == "gpu" or settings.checkpoint or settings.preset == _ON_CPU:
        return settings
    limit = PRESETS[_ON_CPU].max_position_embeddings - settings.steps
    contexts = tuple(context for context in settings.contexts if context <= limit) or (64,)
    batches = tuple(B for B in settings.batches if PRESETS[_ON_CPU].vocab_size >= B) or (1,)
    bar.say(f"No GPU here: the {_ON_CPU} preset in place of {settings.preset}")
    return dataclasses.replace(
        settings, preset=_ON_CPU, layers=0, contexts=contexts, batches=batches
    )


def _measure_ceiling(bar: script.Progress) -> float | None:
    ceiling = environment.measure_read_ceiling()
    for name, tbps in ceiling.all_tbps.items():
        bar.say(f"read of 4 GB, {name}: " + (f"{tbps:.3f} TB/s" if tbps else "failed"))
    return ceiling.tbps


def _measure_baseline(settings: Settings, bar: script.Progress, problems: list[str]) -> list[dict]:
    """The baseline's rows as its process prints them; none where it is not asked for."""
    rows: list[dict] = []
    if settings.baseline == "none":
        return rows
    if settings.checkpoint is not None:
        problems.append("--baseline=transformers needs --preset: its weights are random")
        return rows
    pairs = settings.pairs_of(settings.baseline_batches)
    bar.start("transformers", len(pairs))
    bar.advance("transformers, compiled")
    try:
        for row in measure_in_child(
            _config(dataclasses.replace(settings, weights="bf16")).to_hf("v5"),
            pairs,
            steps=settings.steps,
            repeats=settings.repeats,
            seed=settings.seed,
        ):
            rows.append(row)
            took = row.get("error") or f"{row['ms']:.3f} ms, compiled in {row['compile_s']:.0f} s"
            bar.say(f"transformers, batch {row['batch']}, context {row['context']}: {took}")
    except BaselineError as error:
        problems.append(f"--baseline=transformers: {error}")
        bar.say(problems[-1])
    return rows


def _config(settings: Settings) -> Qwen3MoeConfig:
    """The preset's, with as many layers as asked for, and in their format."""
    config = PRESETS[settings.preset]
    config = _with_layers(config, settings.layers or config.num_hidden_layers)
    if settings.weights == "fp8":
        scaled = fp8_config(config.moe_layers)
        config = dataclasses.replace(config, quantization_config=scaled)
    return config


def _with_layers(config: Qwen3MoeConfig, layers: int) -> Qwen3MoeConfig:
    dense = tuple(layer for layer in config.mlp_only_layers if layer < layers)
    return dataclasses.replace(config, num_hidden_layers=layers, mlp_only_layers=dense)


def make_model(settings: Settings) -> Qwen3Moe:
    """The checkpoint's model, or random weights that are drawn on the device, one by one.

    They are drawn in bf16; those in FP8 are quantised a layer at a time.

    Raises:
      ValueError, OSError, NotImplementedError: the checkpoint cannot be loaded.
    """
    if settings.checkpoint is None:
        return Qwen3Moe(_config(settings), rngs=nnx.Rngs(settings.seed), dtype=jnp.bfloat16)
    to_load = generate_script.Settings(
        checkpoint=settings.checkpoint, prompt_tokens=1, dequantize=settings.dequantize
    )
    model = generate_script.load_to_generate(to_load).model
    layers = settings.layers or model.config.num_hidden_layers
    if layers >= model.config.num_hidden_layers:
        return model
    kept = {
        name: array
        for name, array in to_arrays(model).items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < layers
    }
    return from_arrays(_with_layers(model.config, layers), kept)


run = functools.partial(script.run, Settings, main, one_line=(ValueError, OSError))

if __name__ == "__main__":
    run()
