"""Which candidates are timed and how, what is dropped with a line, and who wins."""

import time
from typing import NamedTuple

import pytest

from experiments.bench import tuning_sweep
from experiments.bench.candidates import configs_to_tune
from experiments.bench.tuning_sweep import OutOfTime, Sweep
from pallas_kernels.decode_experts import LAYOUTS
from tests.experiments.fake_bench import SHAPES, FakeBench

TWO = ("output_major", "expert_major")


def _run(bench, asked, rounds=3, **keywords):
    said = []
    sweep = Sweep(bench.build, say=said.append, **keywords)
    return sweep.run(asked, rounds), sweep, said


@pytest.mark.parametrize("T", [1, 8, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layouts_candidates_begin_with_its_default_and_are_valid(layout, T):
    asked = configs_to_tune([layout], SHAPES, T, None)
    kernel = LAYOUTS[layout]
    assert asked[0].config == kernel.default_config(SHAPES, T)
    assert len(set(asked)) == len(asked)
    for candidate in asked:
        kernel.check(candidate.config, SHAPES)
    assert configs_to_tune([layout], SHAPES, T, 2) == asked[:2]


def test_defaults_come_first_and_a_layout_far_behind_is_left_at_that():
    asked = configs_to_tune(TWO, SHAPES, 1, None)
    slow = lambda candidate, count: {"output_major": 13.0, "expert_major": 10.0}[candidate.layout]  # noqa: E731
    bench = FakeBench(us=slow)
    measured, _, said = _run(bench, asked)
    defaults = [c for c in asked if c.config == LAYOUTS[c.layout].default_config(SHAPES, 1)]
    assert bench.built[:2] == defaults
    assert [c for c in bench.built if c.layout == "output_major"] == defaults[:1]
    assert [c for c in bench.built if c.layout == "expert_major"] == [
        c for c in asked if c.layout == "expert_major"
    ]
    # Its one sample is kept: the default's order of sums is measured at every T.
    assert bench.sampled.count(defaults[0]) == 1
    assert [m.candidate for m in measured] == [c for c in asked if c in bench.built]
    assert said == []


def test_rounds_go_through_all_so_that_drift_decides_nothing():
    asked = configs_to_tune(["expert_major"], SHAPES, 1, 4)
    # The clock slows down all the while: what is timed as a block at the end would lose.
    drifting = FakeBench(us=lambda candidate, count: 100.0 + count / 10)
    measured, _, _ = _run(drifting, asked, rounds=6)
    count = len(asked)
    assert [drifting.sampled.count(c) for c in asked] == [6] * count and count > 2
    assert max(m.us for m in measured) - min(m.us for m in measured) < 0.5
    assert all(m.spread_us > 0 for m in measured)
    first, last = (drifting.sampled[count * n : count * (n + 1)] for n in (1, 2))
    assert set(first) == set(last) == set(asked) and first == last[::-1]


def test_a_config_far_behind_is_timed_once():
    asked = configs_to_tune(["expert_major"], SHAPES, 1, 3)
    bench = FakeBench(us=lambda candidate, count: 20.0 if candidate == asked[1] else 10.0)
    measured, _, _ = _run(bench, asked, rounds=5)
    assert [bench.sampled.count(c) for c in asked] == [5, 1, 5]
    assert [m.us for m in measured] == [10.0, 20.0, 10.0]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("broken", "ValueError: no layout for this tile"),
        ("wrong", "AssertionError: relative error 4.00e-03"),
        ("changing", "AssertionError: the chain's bits changed"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_fails_is_dropped_with_a_line(how, why, which):
    asked = configs_to_tune(["expert_major"], SHAPES, 1, 3)
    # It would win.
    us = lambda candidate, count: 9.0 if candidate == asked[which] else 10.0  # noqa: E731
    bench = FakeBench(us=us, **{how: (asked[which],)})
    measured, sweep, said = _run(bench, asked)
    assert [m.candidate for m in measured] == [c for c in asked if c != asked[which]]
    assert [d.candidate for d in sweep.dropped] == [asked[which]]
    (line,) = said
    assert line.startswith(f"dropped {asked[which]}: {why}")
    if how == "broken":
        assert asked[which] not in bench.sampled
    else:  # the next one was checked in its place
        assert [m.rel_error for m in measured].count(None) == 1
        assert tuning_sweep.fastest(measured).rel_error is not None


def test_nothing_is_left_where_all_fail():
    asked = configs_to_tune(TWO, SHAPES, 1, 2)
    measured, sweep, said = _run(FakeBench(broken=tuple(asked)), asked)
    assert measured == []
    assert len(said) == len(sweep.dropped) == len(asked)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_deadline_ends_a_sweep(threads):
    asked = configs_to_tune(TWO, SHAPES, 1, None)
    bench = FakeBench()
    with pytest.raises(OutOfTime):
        _run(bench, asked, threads=threads, deadline=time.monotonic() - 1)
    assert bench.built == []

    def slow(candidate, count):
        time.sleep(0.05)
        return 10.0

    bench = FakeBench(us=slow)
    with pytest.raises(OutOfTime):
        _run(bench, asked, threads=threads, deadline=time.monotonic() + 0.2)
    assert 0 < len(bench.sampled) < 10


def test_threads_change_no_order():
    asked = configs_to_tune(TWO, SHAPES, 1, None)
    measured, _, _ = _run(FakeBench(), asked, threads=4)
    assert [m.candidate for m in measured] == asked


class Timed(NamedTuple):
    layout: str
    config: object
    us: float


def _timed(layout, us, **fields):
    kernel = LAYOUTS[layout]
    default = kernel.default_config(SHAPES, 1)
    return Timed(layout, kernel.Config(**vars(default) | fields), us)


def test_equal_times_go_to_the_earlier_candidate():
    rows = [_timed("output_major", 10.09), _timed("output_major", 10.0, down_num_stages=3)]
    assert tuning_sweep.fastest(rows) == rows[0]
    rows[0] = rows[0]._replace(us=10.2)
    assert tuning_sweep.fastest(rows) == rows[1]


def _times(rows, *times):
    """The same candidates with other times."""
    return [row._replace(us=us) for row, us in zip(rows, times, strict=True)]


def test_each_order_of_sums_has_a_contender():
    rows = [
        _timed("output_major", 10.0),
        _timed("expert_major", 10.04, down_num_stages=5),
        _timed("expert_major", 9.95),
        _timed("expert_major", 9.0, down_block_m=64),
    ]
    assert tuning_sweep.contenders(rows) == [rows[3], rows[0]]
    assert tuning_sweep.contenders(rows[:3]) == [rows[0], rows[1]]
    assert tuning_sweep.contenders([]) == []


def test_invariant_takes_the_order_of_sums_with_the_least_total():
    rows = [
        _timed("output_major", 10.0),
        _timed("expert_major", 14.0, down_num_stages=5),
        _timed("expert_major", 13.0, down_block_m=64),
    ]
    measured = {1: rows, 64: _times(rows, 900.0, 100.0, 110.0)}
    assert tuning_sweep.invariant(measured) == {1: rows[2], 64: measured[64][1]}
    assert tuning_sweep.fastest(rows) == rows[0]
    measured = {1: rows, 64: _times(rows, 98.0, 100.0, 110.0)}
    assert tuning_sweep.invariant(measured) == {1: rows[0], 64: measured[64][0]}


def test_invariant_needs_an_order_that_was_measured_everywhere():
    a, b = _timed("output_major", 10.0), _timed("expert_major", 20.0)
    assert tuning_sweep.invariant({1: [a, b], 8: [b]}) == {1: b, 8: b}
    assert tuning_sweep.invariant({1: [a], 8: [b]}) == {}
