"""One sweep of configs: which of them run, are right, how long each takes, and which one wins.

1. Every layout's default is built and timed once. A layout whose default is far behind the best one
   is not swept further: no config of ours has moved a time by so much.
2. The others' configs are built and timed once; what is far behind is left at that.
3. The rest is timed in rounds, each round once through all of them, so that a clock that drifts
   moves all alike; every other round goes backwards. The median over rounds counts.
4. The one that would win is checked against float32. If that fails it is dropped, and the next one
   is checked: compiling the layer once more for each candidate would take half of the time.

Nothing is compiled while anything is timed.
"""

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from experiments.bench.candidates import Configured, sum_order

# Times the best one, beyond which a candidate is not timed again.
_FAR_BEHIND = 1.25


class Trial(Protocol):
    """A candidate that is compiled for one layer and number of tokens."""

    def check(self) -> float:
        """Its relative error against float32; raises if that is too large."""

    def sample(self) -> float:
        """Microseconds of a layer, taken anew."""

    def finish(self) -> None:
        """Raises if its outputs changed while it was timed, or are not finite."""


class Bench(Protocol):
    """One layer's weights; LayerBench is the real one."""

    def at(self, T: int) -> Callable[[Configured], Trial]:
        """Draws the inputs of T tokens, and returns what compiles a candidate for them."""


class Measured(NamedTuple):
    """What a sweep found: microseconds (the median over rounds), the range, the relative error.

    The error is None where nothing was at stake.
    """

    candidate: Configured
    us: float
    spread_us: float
    rel_error: float | None

    @property
    def layout(self) -> str:
        return self.candidate.layout

    @property
    def config(self) -> Any:
        return self.candidate.config


class Dropped(NamedTuple):
    """A candidate that did not compile or run, or is wrong."""

    candidate: Configured
    why: str


class OutOfTime(Exception):
    """The budget ended within a sweep."""


class Sweep:
    """The candidates of one layer and number of tokens, as far as they have come."""

    def __init__(
        self,
        build: Callable[[Configured], Trial],
        *,
        threads: int = 1,
        deadline: float | None = None,
        say: Callable[[str], None] = print,
        advance: Callable[[str], None] = lambda what: None,
    ):
        """`build` compiles; `deadline` is a time.monotonic(), None for none."""
        self._build, self._threads, self._deadline = build, threads, deadline
        self._say, self._advance = say, advance
        self._trials: dict[Configured, Trial] = {}
        self._errors: dict[Configured, float] = {}
        self._samples: dict[Configured, list[float]] = {}
        self.dropped: list[Dropped] = []

    def run(self, asked: Sequence[Configured], rounds: int) -> list[Measured]:
        """Runs all steps; the result is in the order of `asked`, without what was dropped.

        Raises:
          OutOfTime: the deadline has passed.
        """
        defaults = list({c.layout: c for c in reversed(asked)}.values())[::-1]
        self._prepare(defaults)
        self._round(defaults)
        near = self._near(defaults)
        # A default that does not run says nothing about the layout's other configs.
        swept = {c.layout for c in defaults if c in near or c not in self._samples}
        others = [c for c in asked if c not in defaults and c.layout in swept]
        self._prepare(others)
        self._round(others)
        last = self._near(asked)
        for index in range(rounds - 1):
            self._round(last[:: -1 if index % 2 == 0 else 1])
        for candidate in list(self._samples):
            self._try(candidate, self._trials[candidate].finish)
        while unchecked := [
            m.candidate
            for m in contenders(self._all_measured(asked))
            if m.candidate not in self._errors
        ]:
            self._check(unchecked[0])
        return self._all_measured(asked)

    def _prepare(self, some: Sequence[Configured]) -> None:
        """Builds, in threads."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            futures = {c: pool.submit(self._build_in_time, c) for c in some}
            for candidate, future in futures.items():
                self._advance(f"building {candidate}")
                trial = self._try(candidate, future.result)
                if trial is not None:
                    self._trials[candidate] = trial

    def _build_in_time(self, candidate: Configured) -> Trial:
        self._check_time()
        return self._build(candidate)

    def _round(self, some: Sequence[Configured]) -> None:
        timed = [c for c in some if c in self._trials]
        self._advance(f"timing {len(timed)} candidates")
        for candidate in timed:
            self._check_time()
            us = self._try(candidate, self._trials[candidate].sample)
            if us is not None:
                self._samples.setdefault(candidate, []).append(us)

    def _check(self, candidate: Configured) -> None:
        self._check_time()
        self._advance(f"checking {candidate}")
        error = self._try(candidate, self._trials[candidate].check)
        if error is not None:
            self._errors[candidate] = error

    def _near(self, some: Sequence[Configured]) -> list[Configured]:
        first = {c: self._samples[c][0] for c in some if c in self._samples}
        return [c for c, us in first.items() if us <= _FAR_BEHIND * min(first.values())]

    def _try(self, candidate: Configured, step: Callable[[], Any]) -> Any:
        """The step's result, or None after a line about a candidate that is dropped for it."""
        try:
            return step()
        except OutOfTime:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(f"dropped {candidate}: {why}")
            self.dropped.append(Dropped(candidate, why))
            self._samples.pop(candidate, None)
            self._trials.pop(candidate, None)
            return None

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime

    def _all_measured(self, asked: Sequence[Configured]) -> list[Measured]:
        return [self._measured(c) for c in asked if c in self._samples]

    def _measured(self, candidate: Configured) -> Measured:
        samples = self._samples[candidate]
        return Measured(
            candidate,
            us=statistics.median(samples),
            spread_us=max(samples) - min(samples),
            rel_error=self._errors.get(candidate),
        )


# Times so near are taken for equal: compiled twice, one kernel differs by more. The earlier of the
# candidates wins then, a layout's default before its other configs.
_EQUAL = 1.01


class TimedConfig(Protocol):
    """A measurement: a layout, its config, microseconds."""

    layout: str
    config: object
    us: float


def fastest[M: TimedConfig](measured: Sequence[M]) -> M:
    """The first one that is as good as the fastest."""
    limit = _EQUAL * min(m.us for m in measured)
    return next(m for m in measured if m.us <= limit)


def contenders[M: TimedConfig](measured: Sequence[M]) -> list[M]:
    """What of one T may get into the table: the fastest, and the fastest of each order of sums."""
    found: list[M] = []
    groups = [measured] if measured else []
    groups += [_of_order(measured, order) for order in dict.fromkeys(_orders(measured))]
    for group in groups:
        if (winner := fastest(group)) not in found:
            found.append(winner)
    return found


def invariant[M: TimedConfig](measured: dict[int, Sequence[M]]) -> dict[int, M]:
    """For each T the one that "invariant" takes: all of one order of sums.

    Of the orders that were measured at every T, the one with the least total; within it, the
    fastest layout and config of each T.

    Args:
      measured: for each T what was measured there.

    Returns:
      Empty if no order of sums was measured at every T.
    """
    choices: list[dict[int, M]] = []
    for order in dict.fromkeys(_orders(m for some in measured.values() for m in some)):
        of_order = {T: _of_order(some, order) for T, some in measured.items()}
        if all(of_order.values()):
            choices.append({T: fastest(some) for T, some in of_order.items()})
    if not choices:
        return {}
    totals = [sum(m.us for m in choice.values()) for choice in choices]
    return next(
        choice
        for choice, total in zip(choices, totals, strict=True)
        if total <= _EQUAL * min(totals)
    )


def _of_order[M: TimedConfig](measured: Sequence[M], order: str) -> list[M]:
    return [m for m in measured if order == sum_order(m.layout)]


def _orders(measured: Iterable[TimedConfig]) -> list[str]:
    return [sum_order(m.layout) for m in measured]
