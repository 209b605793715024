"""Time of one step inside a chain of steps, as decoding runs them: the time that counts.

A step is a function step(carry, inputs) -> carry. A chain is one jitted program of several: step i
takes step i - 1's carry and inputs of its own, so that its weights come from memory and not from
L2. XLA captures the program in a CUDA graph by default; the gaps between kernels are in it.

A program's launch and the wait for it cost 0.1 to 1 ms, whatever it holds. So 1 program is timed
against 1 + n issued back to back: the difference over n * steps is the time of a step.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = Callable[[Any, Any], Any]

# On a GPU: long enough to hide a program's launch behind the program before.
STEPS = 16
_MOST_AHEAD = 12
_AIM_S = 0.02  # of work issued ahead in one sample
_LONG_PROGRAM_S = 0.25  # beyond this, 1 ms of launch is below the noise
# Samples that agree so well are enough: quartiles no further apart than this part of the median.
_ENOUGH_SAMPLES, _SMALL_SPREAD = 5, 0.005


class Timeable(Protocol):
    """A program of `steps` steps that can be issued repeatedly."""

    steps: int

    def enqueue(self) -> None:
        """Issues one run of all steps without waiting for it."""

    def wait(self) -> None:
        """Returns when everything issued has run."""


class Chain:
    """A chain as one compiled XLA program."""

    def __init__(
        self, step: Step, carry: Any, inputs: Sequence[Any], *, restart_every: int | None = None
    ):
        """Compiles it.

        Args:
          step: a function of (carry, inputs of one step), both pytrees, that returns a carry of the
            same shapes and dtypes.
          carry: what the first step takes.
          inputs: what each step takes. An array that comes up several times is one argument.
          restart_every: the number of steps after which the first carry is taken again; None for
            never.
        """
        self.steps = len(inputs)
        self._carry = carry
        self._inputs = _Shared(inputs)
        self._ends = _make_ends(carry, self.steps, restart_every)
        program = _program(step, self._inputs, restart_every)
        jitted = jax.jit(program, donate_argnums=0, keep_unused=True)
        self.compiled = jitted.lower(self._ends, carry, self._inputs.arrays).compile()

    @property
    def temporary_bytes(self) -> int | None:
        """What the program needs on the device besides its arguments and its output."""
        analysis = self.compiled.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)

    def take(self, inputs: Sequence[Any]) -> None:
        """Goes on with other inputs of the same shapes, in the same compiled program."""
        shared = _Shared(inputs)
        if shared.places != self._inputs.places:
            raise ValueError("inputs share their arrays in another way; expected as they were")
        self._inputs = shared

    def enqueue(self) -> None:
        """Issues one run of all steps without waiting for it."""
        self._ends = self.compiled(self._ends, self._carry, self._inputs.arrays)

    def wait(self) -> None:
        """Returns when everything issued has run."""
        jax.block_until_ready(self._ends)

    def result(self) -> Any:
        """The carries before each restart and the last one, stacked, as float32 on the host."""
        return jax.tree.map(
            lambda *ends: np.stack([np.asarray(end.astype(jnp.float32)) for end in ends]),
            *self._ends,
        )


class _Shared:
    """A sequence of pytrees as a list of distinct arrays and each leaf's place in it."""

    def __init__(self, inputs: Sequence[Any]):
        leaves, self.structure = jax.tree.flatten(list(inputs))
        distinct: dict[int, int] = {}
        self.arrays: list[jax.Array] = []
        for leaf in leaves:
            if id(leaf) not in distinct:
                distinct[id(leaf)] = len(self.arrays)
                self.arrays.append(jnp.asarray(leaf))
        self.places = [distinct[id(leaf)] for leaf in leaves]

    def unflatten(self, arrays: Sequence[Any]) -> list[Any]:
        return jax.tree.unflatten(self.structure, [arrays[place] for place in self.places])


def restarts_at(step: int, restart_every: int | None) -> bool:
    """Whether a step takes the chain's first carry instead of the last one."""
    return restart_every is not None and step > 0 and step % restart_every == 0


def _program(step: Step, inputs: _Shared, restart_every: int | None) -> Callable:
    """program(ends, carry, arrays) -> the carries before each restart and the last one.

    `ends` has the shapes of the result and is not read. It is donated, so that the results go
    there: each run sees the same addresses, and its CUDA graph need not be updated.
    """
    one_step = jax.jit(step)  # traced and lowered once for all steps

    def program(ends, carry, arrays):
        del ends
        start, found = carry, []
        for index, given in enumerate(inputs.unflatten(arrays)):
            if restarts_at(index, restart_every):
                found.append(carry)
                # Needs the last carry: two halves that do not depend on each other could run side
                # by side. XLA keeps 0 * x, because x might not be finite.
                carry = jax.tree.map(lambda first, last: first + 0 * last, start, carry)
            # Without the barrier XLA derives what it can of every step's inputs ahead, in one
            # fusion, and shares what a step derives from its weights with the next that has them.
            carry = one_step(*lax.optimization_barrier((carry, given)))
        return [*found, carry]

    return program


def _make_ends(carry: Any, steps: int, restart_every: int | None) -> list[Any]:
    """Zeros of the shapes of a chain's result."""
    restarts = sum(restarts_at(index, restart_every) for index in range(steps))
    return [jax.tree.map(jnp.zeros_like, carry) for _ in range(restarts + 1)]


def after(carry: jax.Array, results: Any) -> jax.Array:
    """`carry` as it is, but not before the arrays in `results` are there: a step's last line.

    For steps whose results are no carry. They are no outputs of the chain either, because XLA would
    copy a kernel's outputs there and not its own. The barrier keeps XLA from narrowing a result to
    the one element that is read of it.
    """
    firsts = [leaf.ravel()[0] for leaf in jax.tree.leaves(lax.optimization_barrier(results))]
    # XLA keeps 0 * x, because x might not be finite.
    return carry + sum(0 * first.astype(carry.dtype) for first in firsts)


class StepTime(NamedTuple):
    """us of a step: the median over samples, and the distance between their quartiles."""

    us: float
    spread_us: float
    # The host was still issuing when the device had nearly finished: `us` is then too long.
    host_bound: bool


def measure_step(
    chain: Timeable, repeats: int, budget_s: float = 1.2, far_us: float | None = None
) -> StepTime:
    """Times a chain.

    Takes fewer samples than `repeats`, but at least 3, where they would exceed the budget, and at
    least 5 where they agree well. One single sample where a step takes more than `far_us`.
    """
    far_s = math.inf if far_us is None else far_us * 1e-6 * chain.steps
    for run in range(3):  # XLA runs the first times kernel by kernel, then records the graph
        program_s, _ = _seconds(chain, 1)
        if run > 0 and program_s > min(far_s, _LONG_PROGRAM_S):
            break
    if program_s > far_s:
        return _summary([program_s / chain.steps], host_bound=False)
    program_s = min(program_s, _seconds(chain, 1)[0])
    ahead = max(1, min(_MOST_AHEAD, round(_AIM_S / program_s)))
    if program_s > _LONG_PROGRAM_S:
        ahead = 0
    cost_s = (2 + ahead if ahead else 1) * program_s
    samples, issuing = [], []
    for _ in range(max(3, min(repeats, int(budget_s / cost_s)))):
        alone, _ = _seconds(chain, 1)
        if ahead:
            together, issue = _seconds(chain, 1 + ahead)
            issuing.append(issue / together)
            samples.append((together - alone) / (ahead * chain.steps))
        else:
            samples.append(alone / chain.steps)
        if len(samples) >= _ENOUGH_SAMPLES:
            low, middle, high = np.percentile(samples, [25, 50, 75])
            if high - low <= _SMALL_SPREAD * middle:
                break
    return _summary(samples, host_bound=bool(issuing) and statistics.median(issuing) > 0.9)


def _seconds(chain: Timeable, programs: int) -> tuple[float, float]:
    """Wall seconds of some runs issued back to back, and the part of it spent issuing them."""
    start = time.perf_counter()
    for _ in range(programs):
        chain.enqueue()
    issued = time.perf_counter()
    chain.wait()
    return time.perf_counter() - start, issued - start


def _summary(samples_s: list[float], host_bound: bool) -> StepTime:
    low, middle, high = np.percentile(samples_s, [25, 50, 75]) * 1e6
    return StepTime(float(middle), float(high - low), host_bound)


def device_us(
    step: Step, carry: Any, inputs: Sequence[Any], restart_every: int | None = None
) -> float:
    """Microseconds of kernels a step of a chain, gaps left out, by CUPTI; arguments as in Chain.

    It can exceed the time in a chain: there one kernel starts up while the one before it drains,
    and here, launched singly and watched by the profiler, each pays for that alone. To be called
    after all chain timings, because an attached profiler slows launches down.

    Raises whatever JAX's experimental profiler raises; RuntimeError if it saw no kernel.
    """
    from jax.experimental.mosaic.gpu import profiler

    shared = _Shared(inputs)
    arguments = _make_ends(carry, len(inputs), restart_every), carry, shared.arrays
    # Nothing is donated, because the profiler runs it twice.
    jitted = jax.jit(_program(step, shared, restart_every), keep_unused=True)
    # Inside a CUDA graph not every driver reports kernels one by one.
    compiled = jitted.lower(*arguments).compile(
        compiler_options={"xla_gpu_enable_command_buffer": ""}
    )
    _, kernels_ms = profiler.Cupti().measure(compiled)(*arguments)
    if kernels_ms is None:
        raise RuntimeError("CUPTI saw no kernel")
    return kernels_ms * 1e3 / len(inputs)
