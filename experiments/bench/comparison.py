"""Runs every candidate at every number of tokens and routing: errors, bits, chain times.

All programs of one T are compiled at once, in threads, before anything there is timed. Candidates
that run the same share their programs, and other routings run in the first one's programs. A
candidate that fails leaves its error in its row, and the others go on.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import accuracy, baselines, timing
from experiments.bench.candidates import Candidate, Program
from experiments.bench.environment import Environment
from experiments.bench.inputs import (
    RESTART_EVERY,
    LayerInputs,
    case_specs,
    draw_inputs,
    layer_step,
)
from experiments.bench.records import Row
from experiments.bench.routings import short_name
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights

# Times the floor, beyond which a baseline is timed once.
_FAR_FROM_FLOOR = 20
# Device times come last and may be cut short; a run's chain times may not.
_DEVICE_TIME_BUDGET_S = 90.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """What is run, all of it on the default device.

    Attributes:
      run: where and how, for the rows.
      routings: the first at all of `tokens`, the others at `other_tokens`.
      dtype, out_dtype: the output's, as the rows say it and as JAX does.
      layers: the weights to rotate over.
      candidates: in the order of the table.
      num_steps: of a chain, each with its own routing.
      num_cases: how many fresh inputs each candidate's error is taken over, at least.
      compile_threads: how many programs are compiled at once.
      deadline: a time.monotonic() after which no more rows are begun; None for none.
    """

    run: Environment
    shapes: ExpertShapes
    tokens: Sequence[int]
    routings: Sequence[str]
    other_tokens: Sequence[int]
    dtype: str
    out_dtype: jnp.dtype
    layers: Sequence[ExpertWeights]
    candidates: Sequence[Candidate]
    num_steps: int
    num_cases: int
    compile_threads: int = 8
    deadline: float | None = None

    def pairs(self) -> Iterator[tuple[int, str]]:
        """Each T and routing, in the order in which they run."""
        for T in self.tokens:
            for routing in self.routings:
                if routing == self.routings[0] or T in self.other_tokens:
                    yield T, routing

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def inputs(self, T: int, routing: str) -> LayerInputs:
        return draw_inputs(
            self.shapes,
            self.layers,
            T,
            routing=routing,
            seed=self.run.seed,
            num_steps=self.num_steps,
            num_cases=self.num_cases,
        )


@dataclasses.dataclass(kw_only=True)
class _Built:
    """A program's compiled parts; `notes` are for the row's config."""

    program: Program
    layer: Callable | None = None
    layer_float32: Callable | None = None
    chain: timing.Chain | None = None
    notes: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class LayoutComparison:
    """The rows so far.

    Attributes:
      say: prints a line.
      advance: called once for each row, with what is about to be timed.
      save: called with all rows so far after each.
      left: what the deadline cut off, a line each.
    """

    plan: ComparisonPlan
    say: Callable[[str], None] = print
    advance: Callable[[str], None] = lambda what: None
    save: Callable[[list[Row]], None] = lambda rows: None
    rows: list[Row] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    # Each candidate's layer at one token, compiled when it is first wanted.
    _alone: dict[Hashable, Callable] = dataclasses.field(default_factory=dict)

    def run(self) -> list[Row]:
        """Fills `rows`."""
        built: dict[Hashable, Future] = {}
        built_for = None
        for T, routing in self.plan.pairs():
            if self.plan.out_of_time:
                self.left.append(f"T = {T}, {routing}")
                continue
            inputs = self.plan.inputs(T, routing)
            if not inputs.is_cold and self.plan.run.read_ceiling_tbps is not None:
                self.say(
                    f"L2 is not cold at T = {T}, {routing}: an expert is read again after "
                    f"{inputs.bytes_before_reuse / 1e6:.0f} MB, so times may be below the floor"
                )
            if built_for != T:
                built.clear()  # the chains hold buffers
                built, built_for = self._build(inputs), T
            self._run_all(built, inputs, routing)
        return self.rows

    def _build(self, inputs: LayerInputs) -> dict[Hashable, Future]:
        """Each distinct program at this T: a finished job, whose result is a _Built."""
        jobs: dict[Hashable, Future] = {}
        with ThreadPoolExecutor(self.plan.compile_threads) as pool:
            for candidate in self.plan.candidates:
                with contextlib.suppress(Exception):  # which its row will say
                    program = candidate.at(inputs.T)
                    if program.key not in jobs:
                        job = pool.submit(self._build_one, candidate, program, inputs)
                        jobs[program.key] = job
        return jobs

    def _build_one(self, candidate: Candidate, program: Program, inputs: LayerInputs) -> _Built:
        built = _Built(program=program, layer=program.layer)
        if candidate.timed and candidate.is_jax:
            built.chain = candidate.chain(program.layer, inputs.x, inputs.steps)
        if built.chain is not None and candidate.kind == "baseline":
            facts = baselines.inspect_baseline(
                candidate.name, built.chain, inputs.T, self.plan.shapes
            )
            built.notes |= facts
            if why := _does_not_fit(built.chain):
                built.notes["skipped"] = why
                built.chain = built.layer = None
                return built
        if candidate.is_jax:
            specs = case_specs(self.plan.shapes, inputs.T)
            built.layer = program.layer.lower(*specs).compile()
            if program.layer_float32 is program.layer:
                built.layer_float32 = built.layer
            elif program.layer_float32 is not None:
                built.layer_float32 = program.layer_float32.lower(*specs).compile()
            if candidate.timed:
                self._layer_alone(candidate)
        return built

    def _layer_alone(self, candidate: Candidate) -> Callable:
        """What the candidate runs at one token."""
        program = candidate.at(1)
        if program.key not in self._alone:
            specs = case_specs(self.plan.shapes, 1)
            self._alone[program.key] = program.layer.lower(*specs).compile()
        return self._alone[program.key]

    def _run_all(self, jobs: dict[Hashable, Future], inputs: LayerInputs, routing: str) -> None:
        """A row for each candidate."""
        checked: dict[Hashable, dict] = {}
        for candidate in self.plan.candidates:
            what = f"T = {inputs.T}, {routing}: {candidate.name}"
            if self.plan.out_of_time:
                self.left.append(what)
                continue
            self.advance(what)
            row = Row(
                run=self.plan.run,
                kind=candidate.kind,
                name=candidate.name,
                tokens=inputs.T,
                routing=short_name(routing),
                dtype=self.plan.dtype,
                backend=candidate.backend,
                **dataclasses.asdict(inputs.traffic),
            )
            try:
                row.config = candidate.at(inputs.T).config
                self._fill(
                    row, candidate, jobs[candidate.at(inputs.T).key].result(), inputs, checked
                )
            except Exception as error:
                _note_failure(row, error)
            if row.error:
                self.say(f"FAILED {what}: {row.error}")
            self.rows.append(row)
            self.save(self.rows)

    def _fill(
        self,
        row: Row,
        candidate: Candidate,
        built: _Built,
        inputs: LayerInputs,
        checked: dict[Hashable, dict],
    ) -> None:
        """Errors, bits and time; `checked` has the figures of the programs that came before."""
        if built.notes:
            row.note(**built.notes)
        if built.layer is None:
            return
        key = built.program.key
        if key not in checked:
            checked[key] = self._errors(candidate, built, inputs)
        for field, value in checked[key].items():
            setattr(row, field, value)
        if candidate.is_jax and candidate.timed:  # interpret mode's bits are not the device's
            alone = self._layer_alone(candidate)
            row.same_bits_alone = accuracy.same_bits_alone(built.layer, inputs.cases[0], alone)
        if candidate.kind == "layout":
            try:
                errors = accuracy.OutputErrors(row.rel_error, row.max_error, row.rounding_error)
                dtype = jnp.dtype(self.plan.out_dtype).name
                accuracy.check_layout(row.name, errors, row.rel_error_before_rounding, dtype)
            except AssertionError as error:
                row.note(error=str(error))  # and its time is taken all the same
        if candidate.timed:
            self._time(row, candidate, built, inputs)

    def _errors(self, candidate: Candidate, built: _Built, inputs: LayerInputs) -> dict:
        """The row's fields that follow from the program alone."""
        found = accuracy.measure_errors(built.layer, inputs.cases, inputs.references)
        fields = {
            "rel_error": found.relative,
            "max_error": found.largest,
            "rounding_error": found.rounding,
        }
        if built.layer_float32 is built.layer:
            fields["rel_error_before_rounding"] = found.relative
        elif built.layer_float32 is not None:
            before = accuracy.measure_errors(built.layer_float32, inputs.cases, inputs.references)
            fields["rel_error_before_rounding"] = before.relative
        if candidate.is_jax and candidate.timed:
            repeated = accuracy.same_bits_repeated(built.layer, inputs.cases[0])
            fields["same_bits_repeated"] = repeated
        return fields

    def _time(self, row: Row, candidate: Candidate, built: _Built, inputs: LayerInputs) -> None:
        chain = built.chain
        if chain is not None:
            chain.take(inputs.steps)
        else:  # torch captures its graph while nothing else runs
            chain = candidate.chain(built.program.layer, inputs.x, inputs.steps)
        far = candidate.kind == "baseline" and row.floor_us is not None
        measured = timing.measure_step(
            chain, self.plan.run.repeats, far_us=_FAR_FROM_FLOOR * row.floor_us if far else None
        )
        row.chain_us, row.chain_us_spread = measured.us, measured.spread_us
        # On a CPU, where dispatch is synchronous here, issuing is running.
        if measured.host_bound and jax.default_backend() == "gpu":
            row.note(warning="the host issued work more slowly than the device ran it")
        last = chain.result()
        if not np.isfinite(last).all() or not last.any():
            raise AssertionError("the chain ended in zeros or in values that are not finite")

    def run_device_times(self) -> None:
        """Fills in device_us, the layouts' first; to be called when all chain times are taken."""
        by_name = {candidate.name: candidate for candidate in self.plan.candidates}
        timed = [row for row in self.rows if row.chain_us and by_name[row.name].is_jax]
        timed.sort(key=lambda row: row.kind != "layout")
        deadline = time.monotonic() + _DEVICE_TIME_BUDGET_S
        if self.plan.deadline is not None:
            deadline = min(deadline, self.plan.deadline)
        failures, succeeded = 0, False
        for row in timed:
            self.advance(f"device time, T={row.tokens} {row.name}")
            if time.monotonic() > deadline:
                row.note(device_us_error="left out: the time for device times was up")
                continue
            if failures >= 2 and not succeeded:
                continue  # CUPTI does not work here; it has been said why
            routing = next(r for r in self.plan.routings if short_name(r) == row.routing)
            inputs = self.plan.inputs(row.tokens, routing)
            try:
                step = layer_step(by_name[row.name].at(row.tokens).layer)
                row.device_us = timing.device_us(step, inputs.x, inputs.steps, RESTART_EVERY)
                succeeded = True
            except Exception as error:
                failures += 1
                row.note(device_us_error=_in_short(error))
                self.say(f"no device time of {row.name} at T = {row.tokens}: {_in_short(error)}")
        self.save(self.rows)


def _does_not_fit(chain: timing.Chain) -> str | None:
    needed, stats = chain.temporary_bytes, jax.devices()[0].memory_stats()
    if needed is None or not stats or "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB free"


def _note_failure(row: Row, error: Exception) -> None:
    if row.kind == "baseline" and "RESOURCE_EXHAUSTED" in str(error):
        row.note(skipped="does not fit: " + _in_short(error))
        return
    row.note(error=_in_short(error))


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
