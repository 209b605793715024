"""How long does the router take, as one kernel and in XLA, and do both choose the same experts?

    python -m experiments.time_router --preset=qwen3_30b_a3b --tokens=1,8,64

Each T is checked first: logits, experts and weights against the float32 twin, float64
being the judge where two logits nearly tie, and each token's bits against the same token alone.
Then one step is timed inside a jitted chain, with so many layers' gates in rotation that they come
from memory. A step ends in an elementwise kernel that makes the next one wait for all results; what
it takes by itself is the row `empty`. On a CPU it only checks, in interpret mode (--preset=tiny).
"""

import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax
from rich.console import Console
from rich.table import Table

from experiments.compare import timing
from experiments.compare.environment import describe
from experiments.compare.layers import make_tokens
from moe_jax.layers import rms_norm
from moe_jax.routing import route, router_logits
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.router import Route, reference_route_tokens, route_tokens

_PRESET = flags.DEFINE_string("preset", "qwen3_30b_a3b", f"Whose sizes: {', '.join(SHAPES)}.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "8", "64"], "Tokens in the batch.")
_NORM = flags.DEFINE_bool("norm", False, "An RMSNorm first.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "How often each time is taken; the median counts.")
_STEPS = flags.DEFINE_integer("steps", 0, "Of a chain, each its own gate; 0: as L2 asks for.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and tokens.")

_COLD_BYTES = 80e6  # what is read before a gate comes round again; L2 holds 50 MB
_LOGITS_BOUND = 1e-5

# A variant: (x, gate, norm_weight or None, K, interpret) -> Route.
VARIANTS: dict[str, Callable] = {}


def _variant(function: Callable) -> Callable:
    VARIANTS[function.__name__.strip("_")] = function
    return function


@_variant
def _kernel(x, gate, norm_weight, K, interpret=False) -> Route:
    return route_tokens(x, gate, K=K, norm_weight=norm_weight, interpret=interpret)


@_variant
def _xla(x, gate, norm_weight, K, interpret=False) -> Route:
    """The model's router."""
    del interpret
    normed = None if norm_weight is None else rms_norm(x, norm_weight, 1e-6)
    logits = router_logits(x if normed is None else normed, gate)
    chosen = route(logits, K, norm_topk_prob=True)
    return Route(chosen.ids, chosen.weights, logits, normed)


@_variant
def _empty(x, gate, norm_weight, K, interpret=False) -> Route:
    del norm_weight, interpret
    weights = jnp.broadcast_to(gate[0, :K].astype(jnp.float32), (len(x), K))
    return Route(weights.astype(jnp.int32), weights, weights, None)


def main(argv: list[str]) -> None:
    """Checks the flags, then each T and variant by itself; exits 1 if anything failed."""
    if len(argv) > 1:
        sys.exit(f"time_router takes flags only; left over: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    if _PRESET.value not in SHAPES:
        sys.exit(f"--preset is {_PRESET.value!r}; expected one of {', '.join(SHAPES)}")
    if not all(tokens.isdigit() and int(tokens) > 0 for tokens in _TOKENS.value):
        sys.exit(f"--tokens is {','.join(_TOKENS.value)!r}; expected numbers, as in 1,8,64")
    shapes = SHAPES[_PRESET.value]
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu:  # interpret mode would hang now and then
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("T", "variant", "us", "less empty", "quartiles", title=_title(shapes))
    failed = 0
    for T in map(int, _TOKENS.value):
        failed += _report(console, f"T = {T} check", lambda T=T: _check(shapes, T, not on_gpu))
        times: dict[str, timing.ChainTime] = {}
        for name in reversed(VARIANTS) if on_gpu else ():

            def measure(name=name, T=T, times=times):
                times[name] = timing.measure(_Chain(VARIANTS[name], shapes, T), _REPEATS.value)
                return f"{times[name].us:.2f} us"

            failed += _report(console, f"T = {T} {name}", measure)
        for name in filter(times.get, VARIANTS):
            _add_row(table, T, name, times[name], times.get("empty"))
    if on_gpu:
        console.print(table)
    console.print(_environment(), highlight=False)
    sys.exit(1 if failed else 0)


def _title(shapes: ExpertShapes) -> str:
    norm = ", RMSNorm first" if _NORM.value else ""
    return f"{_PRESET.value}: E = {shapes.E}, K = {shapes.K}, H = {shapes.H}{norm}"


def _environment() -> str:
    seen = describe(seed=_SEED.value, repeats=_REPEATS.value, commit="", read_ceiling_tbps=None)
    return (
        f"{seen.device_kind}, driver {seen.driver}, jax {seen.jax}, jaxlib {seen.jaxlib}, "
        f"Python {seen.python}, commit {seen.commit}, {seen.date}"
    )


def _report(console: Console, what: str, work: Callable[[], str]) -> int:
    """Prints what the work says; 1 if it fails, which must not stop the rest."""
    try:
        console.print(f"{what}: {work()}", highlight=False)
        return 0
    except Exception as error:
        console.print(f"{what} FAILED: {type(error).__name__}: {error}", markup=False)
        return 1


def _add_row(table: Table, T: int, name: str, time: timing.ChainTime, empty) -> None:
    less = f"{time.us - empty.us:.2f}" if empty and name != "empty" else ""
    host = " host-bound" if time.host_bound else ""
    table.add_row(str(T), name, f"{time.us:.2f}{host}", less, f"{time.spread_us:.2f}")


def _inputs(shapes: ExpertShapes, T: int, num_gates: int):
    keys = jax.random.split(jax.random.key(_SEED.value), num_gates + 1)
    scale = jnp.bfloat16(shapes.H**-0.5)
    gates = [jax.random.normal(key, (shapes.E, shapes.H), jnp.bfloat16) * scale for key in keys[1:]]
    norm_weight = None
    if _NORM.value:
        norm_weight = 1 + jax.random.normal(keys[0], (shapes.H,), jnp.bfloat16) / 8
    return make_tokens(_SEED.value + T, T, shapes.H), gates, norm_weight


def _check(shapes: ExpertShapes, T: int, interpret: bool) -> str:
    """Says how the kernel and its twin agree; raises an AssertionError where they should and don't.

    A norm is left to the kernel alone: its own result is what the logits are judged by.
    """
    K = shapes.K
    x, [gate], norm_weight = _inputs(shapes, T, 1)
    found = jax.block_until_ready(_kernel(x, gate, norm_weight, K, interpret))
    judged = x if found.normed is None else found.normed
    twin = jax.jit(lambda x, gate: reference_route_tokens(x, gate, K=K))(judged, gate)
    error = float(jnp.max(jnp.abs(found.logits - twin.logits)))
    assert error < _LOGITS_BOUND, f"logits are off by {error}"
    _, ids = lax.top_k(found.logits, K)
    own = jnp.take_along_axis(jax.nn.softmax(found.logits), ids, axis=-1)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.weights, own / own.sum(-1, keepdims=True), rtol=1e-5)
    same = [set(a) == set(b) for a, b in zip(found.ids.tolist(), twin.ids.tolist(), strict=True)]
    exact = np.asarray(judged, np.float64) @ np.asarray(gate, np.float64).T
    for t in np.flatnonzero(np.logical_not(same)):
        least = [exact[t, np.asarray(ids[t])].min() for ids in (found.ids, twin.ids)]
        assert abs(least[0] - least[1]) < _LOGITS_BOUND, f"token {t} has other experts"
    for t in {0, T // 2, T - 1}:
        alone = _kernel(x[t : t + 1], gate, norm_weight, K, interpret)
        if not interpret or T <= 8:  # a CPU's product of another width adds in another order
            np.testing.assert_array_equal(alone.logits[0], found.logits[t])
            np.testing.assert_array_equal(alone.weights[0], found.weights[t])
    return (
        f"logits within {error:.1e}, {sum(same)} of {T} tokens have the twin's experts, all right"
    )


class _Chain:
    """A program of many steps for timing.measure; its output goes where the last run's was."""

    def __init__(self, variant: Callable, shapes: ExpertShapes, T: int):
        self.steps = _STEPS.value or max(16, math.ceil(_COLD_BYTES / (2 * shapes.E * shapes.H)))
        self._inputs = _inputs(shapes, T, self.steps)
        step = jax.jit(lambda x, gate, weight: _step(variant, x, gate, weight, shapes.K))

        def program(scratch, x, gates, norm_weight):
            del scratch
            for gate in gates:
                x, gate = lax.optimization_barrier((x, gate))
                x = step(x, gate, norm_weight)
            return x

        self._x = jnp.zeros_like(self._inputs[0])
        jitted = jax.jit(program, donate_argnums=0, keep_unused=True)
        self._compiled = jitted.lower(self._x, *self._inputs).compile()

    def enqueue(self) -> None:
        self._x = self._compiled(self._x, *self._inputs)

    def wait(self) -> None:
        jax.block_until_ready(self._x)

    def result(self) -> np.ndarray:
        return np.asarray(self._x.astype(jnp.float32))


def _step(variant: Callable, x, gate, norm_weight, K: int) -> jax.Array:
    """The next x, which is this one but has to wait for everything.

    The results are no outputs of the program: those of a kernel would be copied there, and XLA's
    own would not. The barrier keeps XLA from leaving out what nobody looks at.
    """
    found = lax.optimization_barrier(variant(x, gate, norm_weight, K))
    last = found.weights[:, :1] + found.ids[:, :1]
    if found.normed is not None:
        last += found.normed[:, :1]
    # XLA keeps 0 * last, for it might not be finite.
    return x + (0 * last).astype(x.dtype)


if __name__ == "__main__":
    app.run(main)
