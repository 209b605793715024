"""A chain takes step after step; a step's time leaves fixed costs out."""

import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import timing
from experiments.bench.environment import COLUMNS, ROWS, tma_read


def affine(x, inputs):
    scale, offset = inputs
    return x * scale + offset


@pytest.fixture(scope="module")
def chain():
    """Ten steps that have one scale and their own offsets, from the start again after eight."""
    scale = jnp.float32(3)
    steps = [(scale, jnp.full((2,), step, jnp.float32)) for step in range(10)]
    made = timing.Chain(affine, jnp.ones(2), steps, restart_every=8)
    return made, steps


def ends_of(steps):
    ends, x = [], np.ones(2)
    for step, (scale, offset) in enumerate(steps):
        if step == 8:
            ends.append(x)
            x = np.ones(2)
        x = x * float(scale) + np.asarray(offset)
    return np.stack([*ends, x])


def test_a_chain_is_step_after_step_with_a_restart(chain):
    made, steps = chain
    for _ in range(2):  # a second run gives the same: the donated outputs are not read
        made.enqueue()
        made.wait()
        np.testing.assert_array_equal(made.result(), ends_of(steps))
    assert made.steps == 10
    assert made.temporary_bytes >= 0


def test_a_chain_takes_other_inputs_without_compiling(chain):
    made, steps = chain
    scale = jnp.float32(2)
    others = [(scale, offset + 1) for _, offset in steps]
    made.take(others)
    made.enqueue()
    np.testing.assert_array_equal(made.result(), ends_of(others))
    with pytest.raises(ValueError, match="share their arrays in another way"):
        made.take([(jnp.float32(2), offset) for _, offset in steps])
    made.take(steps)


def test_an_array_that_comes_up_several_times_is_one_argument(chain):
    made, _ = chain
    text = made.compiled.as_text()
    parameters = {line for line in text.split("ENTRY")[1].splitlines() if " parameter(" in line}
    assert len(parameters) == 2 + 1 + 1 + 10  # two ends, x, the scale, the offsets


def test_a_carry_may_be_a_tree_and_is_as_it_was_after_results():
    def step(carry, weight):
        x, total = carry
        results = jnp.outer(x, weight), {"none": None, "ids": jnp.arange(3)}
        return timing.after(x, results), total + results[0].sum()

    x = jnp.array([1.0, -2.0], jnp.bfloat16)
    made = timing.Chain(step, (x, jnp.float32(0)), [jnp.ones(2)] * 3)
    made.enqueue()
    found, total = made.result()
    np.testing.assert_array_equal(found, [[1.0, -2.0]])
    np.testing.assert_array_equal(total, [3 * -2.0])


class _FakeChain:
    """Takes `fixed` seconds a wait and `step` seconds a step on a clock of its own."""

    def __init__(self, step, fixed, steps=16, noise=()):
        self.steps, self.now, self.programs = steps, 0.0, 0
        self._step, self._fixed, self._pending = step, fixed, 0
        self._noise = itertools.cycle(noise or (1.0,))

    def enqueue(self):
        self._pending += 1
        self.programs += 1

    def wait(self):
        self.now += self._fixed + self._pending * self.steps * self._step * next(self._noise)
        self._pending = 0


def measure(monkeypatch, chain, **keywords):
    monkeypatch.setattr(time, "perf_counter", lambda: chain.now)
    return timing.measure_step(chain, **keywords)


@pytest.mark.parametrize(("step", "fixed"), [(30e-6, 100e-6), (400e-6, 300e-6), (4.8e-3, 1e-3)])
def test_fixed_costs_are_taken_off(monkeypatch, step, fixed):
    found = measure(monkeypatch, _FakeChain(step, fixed), repeats=5)
    assert found.us == pytest.approx(step * 1e6)
    assert found.spread_us == pytest.approx(0, abs=1e-6)
    assert not found.host_bound


def test_slow_chain_stays_near_its_budget(monkeypatch):
    chain = _FakeChain(20e-3, 0.0)
    found = measure(monkeypatch, chain, repeats=100, budget_s=1.2)
    assert found.us == pytest.approx(20e3)
    assert chain.now < 3.5  # warm-up included


def test_samples_that_agree_are_enough_and_others_are_not(monkeypatch):
    steady, unsteady = _FakeChain(30e-6, 0.0), _FakeChain(30e-6, 0.0, noise=(1, 1.1, 0.9, 1.2))
    measure(monkeypatch, steady, repeats=40)
    measure(monkeypatch, unsteady, repeats=40)
    assert steady.programs < unsteady.programs / 4


def test_what_is_far_from_the_floor_is_timed_once(monkeypatch):
    far, near = _FakeChain(500e-6, 1e-4), _FakeChain(500e-6, 1e-4)
    assert measure(monkeypatch, far, repeats=20, far_us=460).us == pytest.approx(500, rel=0.05)
    assert far.programs == 2  # the first one loads the kernels
    measure(monkeypatch, near, repeats=20, far_us=600)
    assert near.programs > 10


def test_every_tile_is_read_once():
    data = jax.random.normal(jax.random.key(0), (ROWS * 2 * 4, COLUMNS)).astype(jnp.bfloat16)
    sums = tma_read(data, blocks=2, num_stages=3, interpret=True)
    first_rows = data.astype(jnp.float32).reshape(4, 2, ROWS, COLUMNS)[:, :, 0]
    chex.assert_trees_all_close(sums, first_rows.sum(axis=0), rtol=1e-6)


def test_tma_read_refuses_rows_left_over():
    with pytest.raises(ValueError, match=r"multiple of 64 \* 3"):
        tma_read(jnp.zeros((ROWS * 4, COLUMNS), jnp.bfloat16), blocks=3, num_stages=2)
