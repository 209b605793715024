"""A layer at T tokens on this device: compiles candidates, checks them against float32, times them.

The time is that of a step in a chain of layers, as in compare_layouts: weights of several layers in
rotation, so that L2 is cold, and a new routing each step.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare import accuracy, byte_model, layers, timing
from experiments.tuning.sweep import Candidate
from experiments.tuning.work import Layer, draw_routings
from pallas_kernels.decode_experts import ExpertWeights, decode_experts

# Twice the L2 cache of an H100 or H200.
_COLD_BYTES = 100e6
_ACCURACY_ROUTINGS = 3
_ACCURACY_ELEMENTS = 512
# Accuracy inputs are drawn from other seeds than the timed ones.
_ACCURACY_SEED = 1_000_003
_SAMPLE_BUDGET_S = 0.3
_INTERPRETED_LAYERS = 2


def make_weights(layer: Layer, seed: int, interpret: bool) -> list[ExpertWeights]:
    """The weights of the layers to rotate over."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    count = _INTERPRETED_LAYERS if interpret else layers.num_layers(layer.shapes, memory)
    keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(count)]
    return [jax.block_until_ready(layers.make_layer(key, layer.shapes)) for key in keys]


class Bench:
    """Inputs of one layer at T tokens, and the trials that share them."""

    def __init__(
        self,
        layer: Layer,
        weights: Sequence[ExpertWeights],
        T: int,
        *,
        routing: str,
        seed: int,
        repeats: int,
        interpret: bool,
        say: Callable[[str], None],
    ):
        self.interpret, self.repeats = interpret, repeats
        self._say, self._name, self._said = say, f"{layer.of}, T = {T}", set()
        self.weights = list(weights)
        # The interpreter takes seconds a step.
        self.steps = 1 if interpret else timing.STEPS
        H = layer.shapes.H
        drawn = draw_routings(layer, routing, T, self.steps, seed)
        self.x = layers.make_tokens(seed, T, H)
        self.routings = layers.calibrate(self.x, self.weights, drawn)
        reuse = byte_model.bytes_before_reuse(drawn, len(self.weights), layer.shapes)
        if reuse < _COLD_BYTES and not interpret:
            self.say_once(f"L2 is not cold: an expert is read again after {reuse / 1e6:.0f} MB")
        # A shard has no expert of some tokens: more routings, or all outputs might be zeros.
        shards = layer.all_experts // layer.shapes.E
        count = max(_ACCURACY_ROUTINGS * shards, -(-_ACCURACY_ELEMENTS // (T * H)))
        self.accuracy_routings = draw_routings(layer, routing, T, count, seed + _ACCURACY_SEED)
        self.accuracy_xs = [
            layers.make_tokens(seed + _ACCURACY_SEED + index, T, H) for index in range(count)
        ]
        self.references = [
            np.asarray(layers.jitted_reference(x, self.weights[0], *routing))
            for x, routing in zip(self.accuracy_xs, self.accuracy_routings, strict=True)
        ]

    def say_once(self, line: str) -> None:
        """Says a line about these measurements, unless it has been said."""
        if line not in self._said:
            self._said.add(line)
            self._say(f"{self._name}: {line}")

    def build(self, candidate: Candidate) -> "DeviceTrial":
        """Compiles the chain; may be called from several threads."""
        return DeviceTrial(self, candidate)


class DeviceTrial:
    """A candidate whose chain is compiled; see sweep.Trial."""

    def __init__(self, bench: Bench, candidate: Candidate):
        self._bench, self._candidate = bench, candidate
        layer = functools.partial(
            decode_experts,
            layout=candidate.layout,
            config=candidate.config,
            out_dtype=jnp.bfloat16,
            interpret=bench.interpret,
        )
        self._layer = layer
        self._chain = timing.JaxChain(layer, bench.weights, bench.routings, bench.x, bench.steps)
        self._first: np.ndarray | None = None

    def check(self) -> float:
        bench = self._bench
        errors = accuracy.measure(
            jax.jit(self._layer),
            bench.weights[0],
            bench.accuracy_xs,
            bench.accuracy_routings,
            bench.references,
        )
        accuracy.check_layout(str(self._candidate), errors, None, "bfloat16")
        return errors.relative

    def sample(self) -> float:
        if self._bench.interpret:
            us = self._wall_us()
        else:
            time_of_step = timing.measure(self._chain, self._bench.repeats, _SAMPLE_BUDGET_S)
            us = time_of_step.us
            if time_of_step.host_bound:
                self._bench.say_once("the host issued work more slowly than the device ran it")
        if self._first is None:
            self._first = self._chain.result()
        return us

    def finish(self) -> None:
        last = self._chain.result()
        if not np.isfinite(last).all():
            raise AssertionError("the chain ended in values that are not finite")
        if not np.array_equal(last, self._first):
            raise AssertionError("the chain's bits changed from one run to another")

    def _wall_us(self) -> float:
        start = time.perf_counter()
        self._chain.enqueue()
        self._chain.wait()
        return (time.perf_counter() - start) * 1e6
