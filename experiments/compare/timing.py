"""Time of one layer inside a chain of layers, as a decode step runs it: the time that counts.

A chain is one jitted program of several steps. Step i's input is step i - 1's output (but for a
restart now and then), its weights are those of layer i % num_layers and its routing is a new one,
so weights come from memory and not from L2. XLA captures the program in a CUDA graph by default;
the gaps between kernels are in it, and so is the grouping, which starts anew in each step.

A program's launch and the wait for it cost 0.1 to 1 ms, whatever it holds. So 1 program is timed
against 1 + n issued back to back: the difference over n * steps is the time of a step.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare.routings import Routing
from pallas_kernels.decode_experts import ExpertWeights

# On a GPU: long enough to hide a program's launch behind the program before.
STEPS = 16
# A chain starts again from the first input after so many steps. The layer squares the size of its
# input, so a candidate's own rounding doubles with each step: calibrated routing weights hold the
# activations' size for 8 steps and not for 16.
_RESTART = 8
_MOST_AHEAD = 12
_AIM_S = 0.02  # of work issued ahead in one sample
_LONG_PROGRAM_S = 0.25  # beyond this, 1 ms of launch is below the noise


class Chain(Protocol):
    """A program of `steps` layers that can be issued repeatedly."""

    steps: int

    def enqueue(self) -> None:
        """Issues one run of all steps without waiting for it."""

    def wait(self) -> None:
        """Returns when everything issued has run."""

    def result(self) -> np.ndarray:
        """The outputs before each restart and the last one, [restarts + 1, T, H] float32."""


def chain_function(layer: Callable, num_layers: int, steps: int) -> Callable:
    """program(scratch, x, layers, routings) -> the outputs before each restart and the last one.

    `scratch` has the shapes of the outputs and is not read: donated, it is where they go, so that
    every run of the program sees the same addresses, its CUDA graph need not be updated, and runs
    follow one another.
    """
    one_layer = jax.jit(layer)  # traced and lowered once for all steps

    def program(scratch, x, layers, routings):
        del scratch
        start, ends = x, []
        for step in range(steps):
            if restarts_at(step):
                ends.append(x)
                # Needs the last step's output: two halves that do not depend on each other could
                # run side by side. XLA keeps 0 * x, for x might not be finite.
                x = start + 0 * x
            ids, weights = routings[step % len(routings)]
            # Without the barrier XLA groups every step's tokens ahead, in one fusion, and shares
            # what a step derives from the weights with the next step on the same layer.
            x, layer_weights, ids, weights = jax.lax.optimization_barrier(
                (x, layers[step % num_layers], ids, weights)
            )
            x = one_layer(x, layer_weights, ids, weights).astype(jnp.bfloat16)
        return [*ends, x]

    return program


def restarts_at(step: int) -> bool:
    """Whether a step takes the chain's first input instead of the last output."""
    return step > 0 and step % _RESTART == 0


def make_scratch(x: jax.Array, steps: int) -> list[jax.Array]:
    """Buffers [T, H] for the outputs of a chain."""
    return [jnp.zeros_like(x) for step in range(steps) if step == 0 or restarts_at(step)]


class JaxChain:
    """A chain as one compiled XLA program."""

    def __init__(
        self,
        layer: Callable,
        layers: Sequence[ExpertWeights],
        routings: Sequence[Routing],
        x: jax.Array,
        steps: int = STEPS,
    ):
        self.steps = steps
        self._x = x
        self._layers = list(layers)
        self._routings = [
            (jnp.asarray(r.expert_ids), jnp.asarray(r.expert_weights)) for r in routings
        ]
        self._y = make_scratch(x, steps)
        program = jax.jit(
            chain_function(layer, len(self._layers), steps), donate_argnums=0, keep_unused=True
        )
        self.compiled = program.lower(self._y, x, self._layers, self._routings).compile()

    @property
    def temporary_bytes(self) -> int | None:
        """What the program needs on the device besides its arguments and its output."""
        analysis = self.compiled.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)

    def enqueue(self) -> None:
        self._y = self.compiled(self._y, self._x, self._layers, self._routings)

    def wait(self) -> None:
        jax.block_until_ready(self._y)

    def result(self) -> np.ndarray:
        return np.stack([np.asarray(y.astype(jnp.float32)) for y in self._y])


class ChainTime(NamedTuple):
    """us of a step: the median over repeats, and the distance between their quartiles."""

    us: float
    spread_us: float
    # The host was still issuing when the device had nearly finished: `us` is then too long.
    host_bound: bool


def measure(chain: Chain, repeats: int, budget_s: float = 1.2) -> ChainTime:
    """Times a chain; takes fewer repeats, but at least 3, where they would exceed the budget."""
    for _ in range(3):  # XLA runs the first times kernel by kernel, then records the graph
        chain.enqueue()
        chain.wait()
    program_s = min(_seconds(chain, 1)[0] for _ in range(2))
    if program_s > _LONG_PROGRAM_S:
        count = max(3, min(repeats, int(budget_s / program_s)))
        samples = [_seconds(chain, 1)[0] / chain.steps for _ in range(count)]
        return _summary(samples, host_bound=False)
    ahead = max(1, min(_MOST_AHEAD, round(_AIM_S / program_s)))
    count = max(3, min(repeats, int(budget_s / ((2 + ahead) * program_s))))
    samples, issuing = [], []
    for _ in range(count):
        alone, _ = _seconds(chain, 1)
        together, issue = _seconds(chain, 1 + ahead)
        samples.append((together - alone) / (ahead * chain.steps))
        issuing.append(issue / together)
    return _summary(samples, host_bound=statistics.median(issuing) > 0.9)


def _seconds(chain: Chain, programs: int) -> tuple[float, float]:
    """Wall seconds of so many runs issued back to back, and the part of it spent issuing them."""
    start = time.perf_counter()
    for _ in range(programs):
        chain.enqueue()
    issued = time.perf_counter()
    chain.wait()
    return time.perf_counter() - start, issued - start


def _summary(samples_s: list[float], host_bound: bool) -> ChainTime:
    low, middle, high = np.percentile(samples_s, [25, 50, 75]) * 1e6
    return ChainTime(float(middle), float(high - low), host_bound)
