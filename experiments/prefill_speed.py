"""How long until the first token, and how near the tensor cores' peak are prefill and training?

    python -m experiments.prefill_speed --preset=qwen3_30b_a3b --baseline=transformers
    python -m experiments.prefill_speed --preset=qwen3_30b_a3b --batches=1 --train_layers=0 \
        --product_tokens=0 --budget_s=100
    python -m experiments.prefill_speed --preset=tiny --tokens=16 --batches=1

Three tables. The time from the call of `stream` to the first token of random prompts, chunks of
--chunk tokens at once, beside transformers in the same call where it is asked for and installed.
Forward and backward of one layer's experts and of a model of --train_layers layers. On a Hopper,
each of the grouped products that such a layer takes, beside a dense one. Operations are those that
the result needs, against the datasheet's peak. Writes a JSONL, row by row. All prefills are
compiled first, by threads. What would begin after --budget_s is left out, and its row says so.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from experiments.bench import environment, prefill_records, prefill_trials, records, script
from experiments.bench.prefill_records import PrefillRow, expert_flop, forward_flop
from experiments.bench.script import flag
from experiments.bench.transformers_child import BaselineError, measure_in_child
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import to_arrays
from moe_jax.presets import PRESETS
from pallas_kernels.grouped_matmul import runs_on

BASELINES = ("none", "transformers")
_LONGEST_ERROR = 300
_COMPILING = 0.8  # of the time that is left, where there is a budget
_BACKWARD = 3  # a forward pass, and two products for each of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes; the weights are random.", of=PRESETS)
    layers: int = flag(0, "Only the first ones; 0 for all.", least=0)
    tokens: tuple[int, ...] = flag(
        (128, 512, 2048, 4096, 16384, 32768), "Of each prompt.", least=1, needs="as in 512,4096"
    )
    batches: tuple[int, ...] = flag((1, 8), "Prompts at once.", least=1, needs="as in 1,8")
    chunk: int = flag(32768, "Tokens of each prompt that run at once.", least=1)
    most_tokens: int = flag(65536, "Of all prompts together; larger pairs are left out.", least=1)
    train_layers: int = flag(4, "Of the model that is trained; 0: nothing is trained.", least=0)
    train_tokens: int = flag(4096, "Of the row, and of the layer's batch.", least=1)
    product_tokens: int = flag(8192, "T of the grouped products; 0 for none.", least=0)
    repeats: int = flag(5, "Samples of each time; the median counts.", least=1)
    seed: int = flag(0, "Of weights and tokens.", least=0)
    budget_s: int = flag(0, "Seconds after which nothing new begins; 0 for no end.", least=0)
    baseline: str = flag("none", "Timed first, where it is installed.", of=BASELINES)
    baseline_tokens: tuple[int, ...] = flag(
        (512, 4096, 16384), "Of --tokens, where the baseline is timed.", least=1
    )
    out: pathlib.Path = flag(
        pathlib.Path("out/prefill_speed"), "The folder for the JSONL.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        script.writable_folder("out", self.out)

    @property
    def name(self) -> str:
        """The model's, in the record and the file's name."""
        return f"{self.preset}_{self.layers}_layers" if self.layers else self.preset

    def config(self, layers: int) -> Qwen3MoeConfig:
        """The preset's, with that number of layers; 0 for all."""
        config = PRESETS[self.preset]
        if not layers:
            return config
        dense = tuple(layer for layer in config.mlp_only_layers if layer < layers)
        return dataclasses.replace(config, num_hidden_layers=layers, mlp_only_layers=dense)

    def pairs(self) -> list[tuple[int, int]]:
        """(batch, tokens) of the prefills."""
        return [(B, S) for S in self.tokens for B in self.batches if self.most_tokens >= B * S]


@dataclasses.dataclass
class Session:
    """Measures row by row; a row that fails says why, and the others go on."""

    settings: Settings
    run: environment.Environment
    path: pathlib.Path
    say: Callable[[str], None]
    begun: float = dataclasses.field(default_factory=time.perf_counter)
    rows: list[PrefillRow] = dataclasses.field(default_factory=list)

    def take(self, kind: str, name: str, tokens: int, flop: float, work, batch: int = 1) -> None:
        """Adds a row with the Times that work() returns, and saves all."""
        row = PrefillRow(run=self.run, kind=kind, name=name, tokens=tokens, batch=batch, flop=flop)
        try:
            if self.left_s() <= 0:
                raise TimeoutError(f"left out after {self.settings.budget_s} s")
            row.ms, row.ms_spread, row.compile_s = work()
        except Exception as error:  # out of memory, say; the next one may fit
            row.notes = {"error": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}
        gc.collect()  # an error's frames hold arrays of the device
        self.add(row)

    def left_s(self) -> float:
        """Seconds until nothing new begins."""
        budget = self.settings.budget_s or math.inf
        return self.begun + budget - time.perf_counter()

    def add(self, row: PrefillRow) -> None:
        """Adds a row, says what it has, and saves all."""
        self.rows.append(row)
        took = row.error or f"{row.ms:.3f} ms"
        self.say(f"{row.name}, batch {row.batch}, {row.tokens} tokens: {took}")
        record = records.Record(preset=self.settings.name, rows=self.rows)
        records.write_record(self.path, record)


def main(settings: Settings) -> str | None:
    """Measures everything; returns what failed."""
    logging.set_verbosity(logging.WARNING)
    console = script.make_console(width=130)
    problems: list[str] = []
    begun = time.perf_counter()
    with script.progress(console) as bar:
        # Before JAX takes any of the GPU's memory.
        others = _measure_baseline(settings, bar, problems)
        run = environment.describe(
            seed=settings.seed,
            repeats=settings.repeats,
            commit=settings.commit,
            read_ceiling_tbps=None,
        )
        path = settings.out / f"{run.device}_{settings.name}.jsonl"
        records.begin_record(path, settings.name, prefill_records.KINDS)
        session = Session(settings, run, path, bar.say, begun)
        for found in others:
            session.add(_baseline_row(settings, run, found))
        _measure_prefill(session)
        if settings.train_layers:
            _measure_training(session)
    prefill_records.print_rows(console, session.rows)
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    problems += prefill_records.failures(session.rows)
    return "\n".join(problems) or None


def _measure_prefill(session: Session) -> None:
    settings = session.settings
    config = settings.config(settings.layers)
    model = Qwen3Moe(config, rngs=nnx.Rngs(settings.seed), dtype=jnp.bfloat16)
    options = {"chunk": settings.chunk, "seed": settings.seed}
    compiled = _compile_all(
        session, functools.partial(prefill_trials.first_token, model, **options)
    )
    options["repeats"] = settings.repeats
    for B, S in settings.pairs():

        def work(B=B, S=S):
            if (B, S) not in compiled:
                raise TimeoutError("it was not compiled in time")
            return prefill_trials.time_first_token(model, B, S, **options)

        flop = forward_flop(config, B, S, predicted=1)
        session.take("prefill", "generate", S, flop, work, batch=B)


def _compile_all(session: Session, call: Callable[[int, int], None]) -> set[tuple[int, int]]:
    """Calls call(batch, tokens) for each pair, all at once, because compiling takes the longest.

    Returns:
      The pairs whose calls have ended, well or not, when the time for it is over.
    """
    pairs = session.settings.pairs()
    pool = concurrent.futures.ThreadPoolExecutor(max(1, len(pairs)))
    futures = {pool.submit(call, B, S): (B, S) for B, S in pairs}
    timeout = session.left_s() * _COMPILING if session.settings.budget_s else None
    done, _ = concurrent.futures.wait(futures, timeout)
    pool.shutdown(wait=False, cancel_futures=True)
    taken = time.perf_counter() - session.begun
    session.say(f"{len(done)} of {len(pairs)} prefills are compiled after {taken:.0f} s in all")
    return {futures[future] for future in done}


def _measure_training(session: Session) -> None:
    settings = session.settings
    T, repeats, seed = settings.train_tokens, settings.repeats, settings.seed
    config = settings.config(settings.train_layers)
    arrays = to_arrays(Qwen3Moe(config, rngs=nnx.Rngs(seed), dtype=jnp.bfloat16))
    names = (f"layers.{config.moe_layers[0]}.mlp.experts.{part}" for part in ("gate_up", "down"))
    gate_up, down = map(arrays.get, names)
    weights = ExpertWeights(gate_up=gate_up, down=down)
    layer = prefill_trials.make_layer(config, weights, T, seed=seed)
    session.take(
        "training",
        "experts of one layer",
        T,
        _BACKWARD * expert_flop(config, T),
        lambda: prefill_trials.time_experts(layer, config.hidden_act, repeats),
    )
    session.take(
        "training",
        f"model of {settings.train_layers} layers",
        T,
        _BACKWARD * forward_flop(config, 1, T, predicted=T),
        lambda: prefill_trials.time_training(config, arrays, T, repeats=repeats, seed=seed),
    )
    on_hopper = jax.default_backend() == "gpu" and runs_on(jax.devices()[0].device_kind)
    if not settings.product_tokens or not on_hopper:
        session.say("the grouped products are not timed: they need a Hopper, and product_tokens")
        return
    layer = prefill_trials.make_layer(config, weights, settings.product_tokens, seed=seed)
    for product in prefill_trials.products(config, layer):
        session.take(
            "product",
            product.name,
            settings.product_tokens,
            product.flop,
            functools.partial(prefill_trials.time_product, product, repeats),
        )


def _measure_baseline(settings: Settings, bar: script.Progress, problems: list[str]) -> list[dict]:
    """The baseline's rows as its process prints them; none where it is not asked for."""
    rows: list[dict] = []
    if settings.baseline == "none":
        return rows
    pairs = [(B, S) for B, S in settings.pairs() if S in settings.baseline_tokens]
    bar.start("transformers", len(pairs))
    try:
        for row in measure_in_child(
            settings.config(settings.layers).to_hf("v5"),
            pairs,
            steps=1,
            repeats=settings.repeats,
            seed=settings.seed,
            phase="prefill",
        ):
            rows.append(row)
            bar.advance("transformers")
    except BaselineError as error:
        problems.append(f"--baseline=transformers: {error}")
        bar.say(problems[-1])
    return rows


def _baseline_row(settings: Settings, run: environment.Environment, found: dict) -> PrefillRow:
    """A row of what transformers_child.measure_in_child yielded."""
    B, S = found["batch"], found["context"]
    return PrefillRow(
        run=run,
        kind="prefill",
        name="transformers",
        tokens=S,
        batch=B,
        flop=forward_flop(settings.config(settings.layers), B, S, predicted=1),
        ms=found.get("ms"),
        ms_spread=found.get("ms_spread"),
        compile_s=found.get("compile_s"),
        versions=found["versions"],
        notes={"error": found["error"]} if "error" in found else None,
    )


run = functools.partial(script.run, Settings, main, one_line=(ValueError, OSError))

if __name__ == "__main__":
    run()
