"""Times a model's decode steps at every batch and context: the chain, `generate`, the kernels.

A batch and context that fails, out of memory for example, leaves its error in its row, and the
others go on.
"""

import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from experiments.bench import kernel_profile, timing
from experiments.bench.decode_bytes import mean_unique_experts, step_bytes
from experiments.bench.decode_chain import DecodeChain
from experiments.bench.decode_records import DecodeRow
from experiments.bench.environment import Environment
from moe_jax.generation import Generation, Sampling, TraceRecorder, collect, stream
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import to_arrays

_SHOWN_KERNELS = 30
_LONGEST_ERROR = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """What is timed.

    Attributes:
      run: where and how, for the rows.
      pairs: batches and contexts, in the order in which they run.
      generate_pairs: those of them that `generate` is timed at.
      steps, feed, experts_backend, attention_backend: as in DecodeChain. `generate` takes the
        experts' backend, and the attention that it chooses for itself.
      generate_tokens: new tokens of each row.
      repeats: samples of a time, at most.
      profile: whether to take the kernels.
      compile_threads: how many chains are made and compiled at once, before the first of them is
        timed. With several, no row has a compile_s.
    """

    run: Environment
    pairs: Sequence[tuple[int, int]]
    generate_pairs: Collection[tuple[int, int]]
    steps: int
    feed: str
    experts_backend: str
    attention_backend: str
    generate_tokens: int
    repeats: int
    profile: bool
    compile_threads: int = 1


@dataclasses.dataclass(kw_only=True)
class DecodeSession:
    """The rows so far.

    Attributes:
      say: prints a line.
      advance: called once for each time, with what is about to be measured.
      save: called with all rows so far after each.
    """

    plan: DecodePlan
    say: Callable[[str], None] = print
    advance: Callable[[str], None] = lambda what: None
    save: Callable[[list[DecodeRow]], None] = lambda rows: None
    rows: list[DecodeRow] = dataclasses.field(default_factory=list)

    def take_baseline(self, found: Iterable[Mapping[str, Any]]) -> None:
        """Makes rows of what transformers_child.measure_in_child yielded."""
        for figures in found:
            row = self._new_row("transformers", figures["batch"], figures["context"])
            row.versions = figures["versions"]
            if "error" in figures:
                row.note(error=figures["error"])
            for name in ("ms", "ms_spread", "compile_s", "peak_bytes"):
                setattr(row, name, figures.get(name))
            self.rows.append(row)
        if self.rows:
            self.save(self.rows)

    def run(self, model: Qwen3Moe) -> None:
        """Fills `rows`."""
        for (B, context), make in self._chains(model):
            row = self._new_row("decode", B, context)
            self.rows.append(row)
            self._try(row, "chain", lambda row=row, make=make: self._time_chain(model, row, make()))
            if (B, context) in self.plan.generate_pairs:
                self._try(row, "generate", lambda row=row: self._time_generate(model, row))
            stats = jax.local_devices()[0].memory_stats()
            row.peak_bytes = stats and stats.get("peak_bytes_in_use")
            self.save(self.rows)

    def _chains(self, model: Qwen3Moe) -> Iterator[tuple[tuple[int, int], Callable]]:
        """Each pair, and what returns its chain: made then, or already in a thread."""
        plan = self.plan
        if plan.compile_threads == 1:
            for pair in plan.pairs:
                yield pair, functools.partial(self._make_chain, model, *pair)
            return
        for pairs in itertools.batched(plan.pairs, plan.compile_threads):
            self.advance(f"compiling {len(pairs)} chains")
            with ThreadPoolExecutor(len(pairs)) as pool:
                made = [pool.submit(self._make_chain, model, *pair) for pair in pairs]
            for pair in pairs:  # no chain is kept here, because its cache may be large
                yield pair, made.pop(0).result

    def _make_chain(self, model: Qwen3Moe, B: int, context: int) -> DecodeChain:
        plan = self.plan
        return DecodeChain(
            model,
            B=B,
            context=context,
            steps=plan.steps,
            feed=plan.feed,
            seed=plan.run.seed,
            experts_backend=plan.experts_backend,
            attention_backend=plan.attention_backend,
        )

    def _new_row(self, kind: str, B: int, context: int) -> DecodeRow:
        plan = self.plan
        feed = plan.feed if kind == "decode" else "given"
        return DecodeRow(
            run=plan.run, kind=kind, batch=B, context=context, steps=plan.steps, feed=feed
        )

    def _try(self, row: DecodeRow, what: str, work: Callable[[], str]) -> None:
        """Runs it and says what it says, or notes its error."""
        where = f"{what}, batch {row.batch}, context {row.context}"
        self.advance(where)
        try:
            self.say(f"{where}: {work()}")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
            row.note(error=f"{row.error}; {what}: {found}" if row.error else f"{what}: {found}")
            self.say(f"{where} FAILED: {found}")
        gc.collect()  # an error's frames hold arrays of the device

    def _time_chain(self, model: Qwen3Moe, row: DecodeRow, chain: DecodeChain) -> str:
        plan = self.plan
        row.program_bytes = chain.program_bytes
        if plan.compile_threads == 1:
            row.compile_s = chain.compile_s
        row.backends = chain.backends
        taken = timing.measure_step(chain, plan.repeats)
        chain.chosen()  # fails if there are NaN
        expert_ids = chain.expert_ids()
        read = step_bytes(
            model.config,
            to_arrays(model),
            expert_ids,
            context=row.context,
            cache_itemsize=chain.cache_itemsize,
        )
        row.take_bytes(read, float(np.mean(mean_unique_experts(expert_ids))))
        row.ms, row.ms_spread = taken.us / 1e3, taken.spread_us / 1e3
        if taken.host_bound:
            row.note(host_bound=True)
        said = f"{row.ms:.3f} ms a step, {row.tokens_per_s:.0f} tok/s"
        if row.limit_share is not None:
            said += (
                f", {100 * row.limit_share:.1f}% of the limit of {row.limit_tokens_per_s:.0f} "
                f"({row.step_bytes / 1e9:.2f} GB, {row.unique_experts:.1f} experts a layer)"
            )
        if row.compile_s is not None:
            said += f"; compiled in {row.compile_s:.1f} s"
        if plan.profile:
            said += "\n" + self._profile(chain, row)
        return said

    def _profile(self, chain: DecodeChain, row: DecodeRow) -> str:
        """Fills in the kernels; an error is the row's note, because its time stands."""

        def run() -> None:
            chain.enqueue()
            chain.wait()

        try:
            kernels = kernel_profile.profile_kernels(run)
        except Exception as error:
            row.note(profile_error=f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])
            return f"profile failed: {row.notes['profile_error']}"
        profile = kernel_profile.Profile(
            kernels, chain.compiled.as_text(), kernel_profile.DECODE_STEP, chain.steps
        )
        row.kernels = profile.record()
        return "\n".join(profile.kernel_lines(_SHOWN_KERNELS))

    def _time_generate(self, model: Qwen3Moe, row: DecodeRow) -> str:
        compiled_s, made = self._generate(model, row)
        second_s, made = self._generate(model, row)
        row.generate_compile_s = max(0.0, compiled_s - second_s)
        row.first_token_s = made.first_token_seconds
        row.generate_ms = 1e3 * made.decode_seconds / made.decode_steps
        said = (
            f"{row.generate_ms:.3f} ms a step, {row.generate_tokens_per_s:.0f} tok/s, first token "
            f"after {row.first_token_s:.3f} s; compiled in {row.generate_compile_s:.1f} s"
        )
        if model.config.moe_layers:
            self._count_experts_of_generate(model, row)
            said += f"; {row.generate_experts:.1f} experts a layer"
        return said

    def _count_experts_of_generate(self, model: Qwen3Moe, row: DecodeRow) -> None:
        """In a run of its own, of the same tokens, because a run that is timed captures nothing."""
        recorder = TraceRecorder()
        self._generate(model, row, on_routing=recorder)
        ids = np.asarray(recorder.trace().expert_ids)  # [layers, steps * B, K]
        layers, _, K = ids.shape
        by_step = np.moveaxis(ids.reshape(layers, -1, row.batch, K), 1, 0)
        parameters = to_arrays(model)
        read = step_bytes(
            model.config,
            parameters,
            by_step,
            context=row.context,
            cache_itemsize=parameters["embed_tokens.weight"].dtype.itemsize,
        )
        row.generate_step_bytes = read.total
        row.generate_experts = float(np.mean(mean_unique_experts(by_step)))

    def _generate(self, model: Qwen3Moe, row: DecodeRow, **options) -> tuple[float, Generation]:
        """Seconds of a whole run, and what it made, on random prompts.

        Tokens are drawn at temperature 1: greedy rows of a random model would soon be the same.

        Args:
          model: whose.
          row: its batch and context.
          options: of `stream`.
        """
        random = np.random.default_rng([self.plan.run.seed, row.batch])
        V = model.config.vocab_size
        begun = time.perf_counter()
        events = stream(
            model,
            random.integers(0, V, (row.batch, row.context)).tolist(),
            sampling=Sampling(temperature=1.0),
            max_new_tokens=self.plan.generate_tokens,
            seed=self.plan.run.seed,
            decode_backend=self.plan.experts_backend,
            **options,
        )
        made = collect(events, row.batch)
        return time.perf_counter() - begun, made
