"""Goes through the layers and numbers of tokens, the most useful first, until the time is over."""

import gc
import time
from collections.abc import Callable
from typing import Protocol

from experiments.compare.output import Progress
from experiments.tuning.settings import Settings
from experiments.tuning.store import Store
from experiments.tuning.sweep import Candidate, OutOfTime, Sweep, Trial, candidates
from experiments.tuning.work import Layer, useful_first


class Bench(Protocol):
    """What builds the candidates of one layer at T tokens; bench.Bench is the real one."""

    def build(self, candidate: Candidate) -> Trial:
        """Compiles."""


def tune(
    settings: Settings,
    store: Store,
    bench_of: Callable[[Layer], Callable[[int], Bench]],
    bar: Progress,
    deadline: float | None,
) -> list[str]:
    """Fills the store, which is written after each sweep.

    Args:
      settings: what to tune.
      store: what is there already is left alone, unless settings.again.
      bench_of: makes a layer's weights, and returns what makes the bench of T tokens.
      bar: shows how far it is.
      deadline: a time.monotonic(), None for none.

    Returns:
      Lines about what was not measured: out of time, or no candidate came through.
    """
    missing: list[str] = []
    for layer in settings.layers:
        bench_at = None
        for T in useful_first(settings.tokens):
            name = f"{layer.of}, T = {T}"
            if store.has(layer.shapes, T) and not settings.again:
                bar.say(f"{name}: in the table already")
                continue
            if deadline is not None and time.monotonic() > deadline:
                missing.append(f"{name}: out of time")
                continue
            if bench_at is None:
                gc.collect()  # the layer before this one, or its weights would lie beside these
                bench_at = bench_of(layer)
            try:
                found = _sweep(settings, layer, T, bench_at, store, bar, deadline)
            except OutOfTime:
                missing.append(f"{name}: out of time")
                continue
            if not found:
                missing.append(f"{name}: no candidate came through")
    return missing


def _sweep(settings, layer: Layer, T: int, bench_at, store: Store, bar, deadline) -> bool:
    """One layer at T tokens, into the store; whether any candidate came through.

    A function of its own, so that nothing of a sweep outlives it: its trials hold on to weights.
    """
    asked = candidates(settings.layouts, layer.shapes, T, settings.most_configs)
    # The defaults and the other configs have a first round each; two orders of sums are checked.
    bar.start(f"{layer.of}, T = {T}", len(asked) + settings.rounds + 3)
    begun = time.monotonic()
    sweep = Sweep(
        bench_at(T).build,
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
            f"{layer.of}, T = {T}: {best.us:.1f} us by {best.candidate}; "
            f"{len(measured)} of {len(asked)} candidates timed, {len(sweep.dropped)} dropped, "
            f"{time.monotonic() - begun:.0f} s"
        )
    return bool(measured)
