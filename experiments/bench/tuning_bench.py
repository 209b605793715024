"""What a sweep of configs times: a layer or a shard of one, on this device.

The time is that of a step in a chain of layers, as in compare_layouts: weights of several layers in
rotation, so that L2 is cold, and a new routing each step.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.bench import accuracy, timing
from experiments.bench.candidates import Configured, configured_layer, layer_chain
from experiments.bench.inputs import LayerInputs, draw_inputs, draw_layers
from experiments.bench.tuning_sweep import Trial
from pallas_kernels.decode_experts import ExpertShapes

_INTERPRETED_LAYERS = 2
_ACCURACY_CASES = 3
_SAMPLE_BUDGET_S = 0.3


class Layer(NamedTuple):
    """A layer, or a shard of one, as decode_experts is called with it.

    Attributes:
      of: its name in the table.
      shapes: the sizes that the call sees.
      all_experts: how many experts the router chooses from, in all shards together.
    """

    of: str
    shapes: ExpertShapes
    all_experts: int


class LayerBench:
    """A layer's weights on this device; candidates are timed in a chain, as in compare_layouts."""

    def __init__(
        self,
        layer: Layer,
        *,
        routing: str,
        seed: int,
        repeats: int,
        interpret: bool,
        say: Callable[[str], None],
    ):
        self.layer, self.routing, self.seed, self.say = layer, routing, seed, say
        self.repeats, self.interpret = repeats, interpret
        self.weights = draw_layers(layer.shapes, seed, _INTERPRETED_LAYERS if interpret else None)

    def at(self, T: int) -> Callable[[Configured], Trial]:
        """See Bench."""
        shapes, all_experts = self.layer.shapes, self.layer.all_experts
        inputs = draw_inputs(
            shapes,
            self.weights,
            T,
            routing=self.routing,
            seed=self.seed,
            # The interpreter takes seconds a step.
            num_steps=1 if self.interpret else timing.STEPS,
            num_cases=_ACCURACY_CASES,
            all_experts=None if all_experts == shapes.E else all_experts,
        )
        said: set[str] = set()

        def say_once(line: str) -> None:
            if line not in said:
                said.add(line)
                self.say(f"{self.layer.of}, T = {T}: {line}")

        if not inputs.is_cold and not self.interpret:
            megabytes = inputs.bytes_before_reuse / 1e6
            say_once(f"L2 is not cold: an expert is read again after {megabytes:.0f} MB")
        return lambda candidate: ChainTrial(self, candidate, inputs, say_once)


class ChainTrial:
    """A candidate whose chain is compiled; see Trial."""

    def __init__(
        self,
        bench: LayerBench,
        candidate: Configured,
        inputs: LayerInputs,
        say_once: Callable[[str], None],
    ):
        self._candidate, self._inputs, self._say_once = candidate, inputs, say_once
        self._repeats, self._interpret = bench.repeats, bench.interpret
        self._layer = configured_layer(candidate, jnp.bfloat16, bench.interpret)
        self._chain = layer_chain(self._layer, inputs.x, inputs.steps)
        self._first: np.ndarray | None = None

    def check(self) -> float:
        errors = accuracy.measure_errors(self._layer, self._inputs.cases, self._inputs.references)
        accuracy.check_layout(str(self._candidate), errors, None, "bfloat16")
        return errors.relative

    def sample(self) -> float:
        if self._interpret:
            start = time.perf_counter()
            self._chain.enqueue()
            self._chain.wait()
            us = (time.perf_counter() - start) * 1e6
        else:
            taken = timing.measure_step(self._chain, self._repeats, _SAMPLE_BUDGET_S)
            us = taken.us
            if taken.host_bound:
                self._say_once("the host issued work more slowly than the device ran it")
        if self._first is None:
            self._first = self._chain.result()
        return us

    def finish(self) -> None:
        last = self._chain.result()
        if not np.isfinite(last).all():
            raise AssertionError("the chain ended in values that are not finite")
        if not np.array_equal(last, self._first):
            raise AssertionError("the chain's bits changed from one run to another")
