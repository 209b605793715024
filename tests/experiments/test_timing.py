"""A chain computes layer after layer; a step's time leaves fixed costs out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compare import hlo, layers, timing
from experiments.compare.baselines import xla_gather
from experiments.compare.read_ceiling import COLUMNS, ROWS, tma_read
from experiments.compare.routings import make_routings
from pallas_kernels.decode_experts import ExpertShapes

SHAPES = ExpertShapes(E=4, K=2, H=128, I=64)


@pytest.fixture(scope="module")
def inputs():
    weights = [layers.make_layer(jax.random.key(index), SHAPES) for index in range(2)]
    x = layers.make_tokens(3, 2, SHAPES.H)
    routings = layers.calibrate(x, weights, make_routings("uniform", SHAPES, 2, 10, 0))
    return weights, x, routings


def test_chain_is_layer_after_layer_with_a_restart(inputs):
    weights, x, routings = inputs
    chain = timing.JaxChain(xla_gather, weights, routings, x, steps=10)
    for _ in range(2):  # a second run gives the same: the donated outputs are not read
        chain.enqueue()
        chain.wait()
        found = chain.result()
    ends, y = [], x
    for step in range(10):
        if step == 8:
            ends.append(y)
            y = x
        y = xla_gather(y, weights[step % 2], *routings[step])
    expected = np.stack([np.asarray(end, np.float32) for end in (*ends, y)])
    chex.assert_shape(found, (2, 2, SHAPES.H))
    # What XLA fuses differs between the two, and each step squares a difference in size.
    difference = np.linalg.norm(found - expected, axis=(1, 2))
    assert (difference < [0.5, 0.05] * np.linalg.norm(expected, axis=(1, 2))).all()


class _FakeChain:
    """Takes `fixed` seconds a wait and `step` seconds a step on a clock of its own."""

    def __init__(self, step, fixed, steps=16):
        self.steps, self.now = steps, 0.0
        self._step, self._fixed, self._pending = step, fixed, 0

    def enqueue(self):
        self._pending += 1

    def wait(self):
        self.now += self._fixed + self._pending * self.steps * self._step
        self._pending = 0


@pytest.mark.parametrize(("step", "fixed"), [(30e-6, 100e-6), (400e-6, 300e-6), (4.8e-3, 1e-3)])
def test_fixed_costs_are_taken_off(monkeypatch, step, fixed):
    chain = _FakeChain(step, fixed)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: chain.now)
    found = timing.measure(chain, repeats=5)
    assert found.us == pytest.approx(step * 1e6)
    assert found.spread_us == pytest.approx(0, abs=1e-6)
    assert not found.host_bound


def test_slow_chain_stays_near_its_budget(monkeypatch):
    chain = _FakeChain(20e-3, 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: chain.now)
    found = timing.measure(chain, repeats=100, budget_s=1.2)
    assert found.us == pytest.approx(20e3)
    assert chain.now < 3.5  # warm-up included


def test_ragged_product_made_dense_is_seen():
    text = "%f = bf16[16,128,2048]{2,1,0} fusion(%a), kind=kLoop"
    shapes = ExpertShapes(E=128, K=8, H=2048, I=768)
    assert hlo.is_dense_expansion(text, 2, shapes)
    assert hlo.is_dense_expansion(text.replace("[16,128,", "[128,16,"), 2, shapes)
    assert not hlo.is_dense_expansion(text, 4, shapes)


def test_every_tile_is_read_once():
    data = jax.random.normal(jax.random.key(0), (ROWS * 2 * 4, COLUMNS)).astype(jnp.bfloat16)
    sums = tma_read(data, blocks=2, num_stages=3, interpret=True)
    first_rows = data.astype(jnp.float32).reshape(4, 2, ROWS, COLUMNS)[:, :, 0]
    chex.assert_trees_all_close(sums, first_rows.sum(axis=0), rtol=1e-6)


def test_tma_read_refuses_rows_left_over():
    with pytest.raises(ValueError, match=r"multiple of 64 \* 3"):
        tma_read(jnp.zeros((ROWS * 4, COLUMNS), jnp.bfloat16), blocks=3, num_stages=2)
