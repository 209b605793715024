"""Runs every candidate at every number of tokens: error, then chain time, then device time.

A candidate that fails leaves its error in its record, and the others go on.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare import accuracy, byte_model, device_time, hlo, layers, same_bits, timing
from experiments.compare.candidates import Candidate
from experiments.compare.records import Measurement
from experiments.compare.routings import Routing, make_routings
from experiments.compare.settings import Settings
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights

# Enough routings for so many outputs, so that one lucky routing does not decide.
_ACCURACY_ELEMENTS = 512
# Accuracy inputs are drawn from other seeds than the timed ones.
_ACCURACY_SEED = 1_000_003
# Device times come last and may be cut short; a run's chain times may not.
_DEVICE_TIME_BUDGET_S = 90.0
# Threads. What they run, the device runs in turn: JAX gives it one stream.
_CHECKED_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run, all of it on the default device.

    Attributes:
      settings: the flags; `preset`, `shapes`, `tokens` and `routing` below go before theirs, for a
        CPU runs a smaller shape than was asked for.
      layers: the weights to rotate over.
      candidates: in the order of the table.
      steps: of a chain, each with its own routing.
      accuracy_routings: how many fresh inputs each candidate's error is taken over, at least.
      ceiling_tbps: the device's read ceiling, None if it has not been measured.
    """

    settings: Settings
    preset: str
    shapes: ExpertShapes
    tokens: Sequence[int]
    routing: str
    layers: Sequence[ExpertWeights]
    candidates: Sequence[Candidate]
    steps: int
    accuracy_routings: int
    ceiling_tbps: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything that candidates share at T tokens."""

    T: int
    x: jax.Array
    routings: list[Routing]
    traffic: byte_model.Traffic
    accuracy_xs: list[jax.Array]
    accuracy_routings: list[Routing]
    references: list[np.ndarray]


def run(
    plan: Plan,
    advance: Callable[[str], None],
    say: Callable[[str], None],
    save: Callable[[list[Measurement]], None],
) -> list[Measurement]:
    """Errors and chain times, saved after each number of tokens.

    The layouts' errors and bits at once, in threads, for most of that is compiling; then, with
    nothing beside it, each candidate's chain.

    Args:
      plan: what to run.
      advance: called once for each candidate and number of tokens, with what is about to be timed.
      say: prints a line.
      save: called with all measurements so far.
    """
    measurements: list[Measurement] = []
    for T in plan.tokens:
        inputs = _make_inputs(plan, T)
        together = [c for c in plan.candidates if c.kind == "layout" and c.timed and c.is_jax]
        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            ahead = {c.name: pool.submit(_check, plan, c, inputs) for c in together}
        for candidate in plan.candidates:
            advance(f"T={T} {candidate.name}")
            job = ahead.get(candidate.name)
            measurement, chain = job.result() if job else _check(plan, candidate, inputs)
            measurements.append(measurement)
            if chain is not None:
                try:
                    _time(plan, chain, measurement)
                except Exception as error:
                    _note_failure(candidate, measurement, error)
            if measurement.error:
                say(f"FAILED {candidate.name} at T = {T}: {measurement.error}")
        save(measurements)
    return measurements


def run_device_times(
    plan: Plan,
    measurements: Sequence[Measurement],
    advance: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Fills in device_us, the layouts' first; to be called when all chain times are taken."""
    by_name = {candidate.name: candidate for candidate in plan.candidates}
    timed = [m for m in measurements if m.chain_us is not None and by_name[m.name].is_jax]
    timed.sort(key=lambda m: m.kind != "layout")
    deadline = time.monotonic() + _DEVICE_TIME_BUDGET_S
    failures, succeeded = 0, False
    for m in timed:
        advance(f"device time, T={m.tokens} {m.name}")
        if time.monotonic() > deadline:
            m.note(device_us_error=f"left out after {_DEVICE_TIME_BUDGET_S:.0f} s of device times")
            continue
        if failures >= 2 and not succeeded:
            continue  # CUPTI does not work here; it has been said why
        seed = plan.settings.seed
        routings = make_routings(plan.routing, plan.shapes, m.tokens, plan.steps, seed)
        x = layers.make_tokens(seed, m.tokens, plan.shapes.H)
        try:
            m.device_us = device_time.device_us(by_name[m.name].layer, plan.layers, routings, x)
            succeeded = True
        except Exception as error:
            failures += 1
            m.note(device_us_error=_in_short(error))
            say(f"no device time of {m.name} at T = {m.tokens}: {_in_short(error)}")


def _make_inputs(plan: Plan, T: int) -> _Inputs:
    seed, shapes = plan.settings.seed, plan.shapes
    x = layers.make_tokens(seed, T, shapes.H)
    routings = make_routings(plan.routing, shapes, T, plan.steps, seed)
    count = max(plan.accuracy_routings, -(-_ACCURACY_ELEMENTS // (T * shapes.H)))
    fresh = make_routings(plan.routing, shapes, T, count, seed + _ACCURACY_SEED)
    xs = [layers.make_tokens(seed + _ACCURACY_SEED + index, T, shapes.H) for index in range(count)]
    return _Inputs(
        T=T,
        x=x,
        routings=layers.calibrate(x, plan.layers, routings),
        traffic=byte_model.traffic(routings, shapes),
        accuracy_xs=xs,
        accuracy_routings=fresh,
        references=[
            np.asarray(layers.jitted_reference(x, plan.layers[0], *routing))
            for x, routing in zip(xs, fresh, strict=True)
        ],
    )


def _new_measurement(plan: Plan, candidate: Candidate, inputs: _Inputs) -> Measurement:
    return Measurement(
        kind=candidate.kind,
        name=candidate.name,
        preset=plan.preset,
        tokens=inputs.T,
        routing=plan.routing,
        dtype=plan.settings.dtype,
        unique_experts=inputs.traffic.unique_experts,
        unique_bytes=inputs.traffic.unique_bytes,
        requested_bytes=inputs.traffic.requested_bytes,
        backend=candidate.backend,
    )


def _check(
    plan: Plan, candidate: Candidate, inputs: _Inputs
) -> tuple[Measurement, timing.Chain | None]:
    """A measurement with everything but times, and the chain to time, if there is one to."""
    m = _new_measurement(plan, candidate, inputs)
    chain = None
    try:
        m.config = candidate.config(inputs.T)
        if candidate.timed:
            arguments = candidate.layer, plan.layers, inputs.routings, inputs.x, plan.steps
            chain = candidate.chain(*arguments)
        if isinstance(chain, timing.JaxChain) and candidate.kind == "baseline":
            m.note(**hlo.inspect(candidate.name, chain, inputs.T, plan.shapes))
            if why := _does_not_fit(chain):
                m.note(skipped=why)
                return m, None
        _measure_errors(plan, candidate, inputs, m)
        _compare_bits(plan, candidate, inputs, m)
    except Exception as error:
        _note_failure(candidate, m, error)
        return m, None
    return m, chain


def _time(plan: Plan, chain: timing.Chain, m: Measurement) -> None:
    measured = timing.measure(chain, plan.settings.repeats)
    m.set_chain(measured.us, measured.spread_us, plan.ceiling_tbps)
    # On a CPU, where dispatch is synchronous here, issuing is running.
    if measured.host_bound and jax.default_backend() == "gpu":
        m.note(warning="the host issued work more slowly than the device ran it")
    last = chain.result()
    if not np.isfinite(last).all() or not last.any():
        raise AssertionError("the chain ended in zeros or in values that are not finite")


def _measure_errors(plan: Plan, candidate: Candidate, inputs: _Inputs, m: Measurement) -> None:
    def errors(layer):
        return accuracy.measure(
            jax.jit(layer) if candidate.is_jax else layer,
            plan.layers[0],
            inputs.accuracy_xs,
            inputs.accuracy_routings,
            inputs.references,
        )

    found = errors(candidate.layer)
    m.rel_error, m.max_error = found.relative, found.largest
    if candidate.layer_float32 is not None:
        same = plan.settings.out_dtype == jnp.float32
        before = found if same else errors(candidate.layer_float32)
        m.rel_error_before_rounding = before.relative
    if candidate.kind == "layout":
        try:
            accuracy.check_layout(
                candidate.name,
                found,
                m.rel_error_before_rounding,
                jnp.dtype(plan.settings.out_dtype).name,
            )
        except AssertionError as error:
            m.note(error=str(error))  # and its time is taken all the same


def _compare_bits(plan: Plan, candidate: Candidate, inputs: _Inputs, m: Measurement) -> None:
    if not (candidate.is_jax and candidate.timed):  # interpret mode's bits are not the device's
        return
    layer = jax.jit(candidate.layer)
    arguments = plan.layers[0], inputs.accuracy_xs[0], inputs.accuracy_routings[0]
    m.same_bits_repeated = same_bits.repeated(layer, *arguments)
    m.same_bits_alone = same_bits.alone(layer, *arguments)


def _does_not_fit(chain: timing.JaxChain) -> str | None:
    needed, stats = chain.temporary_bytes, jax.devices()[0].memory_stats()
    if needed is None or not stats or "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB free"


def _note_failure(candidate: Candidate, m: Measurement, error: Exception) -> None:
    if candidate.kind == "baseline" and "RESOURCE_EXHAUSTED" in str(error):
        m.note(skipped="does not fit: " + _in_short(error))
        return
    m.note(error=_in_short(error))


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
