"""How long does the router take, as one kernel and in XLA, and do both choose the same experts?

    python -m experiments.time_router --preset=qwen3_30b_a3b --tokens=1,8,64

Each T is checked first: logits, experts and weights against the float32 twin, float64
being the judge where two logits nearly tie, and each token's bits against the same token alone.
Then one step is timed inside a jitted chain, with enough layers' gates in rotation that they come
from memory. A step ends in an elementwise kernel that makes the next one wait for all results; what
it takes by itself is the row `empty`. On a CPU it only checks, in interpret mode (--preset=tiny).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from rich.console import Console
from rich.table import Table

from experiments.bench import environment, script, timing
from experiments.bench.inputs import RouterCase, draw_router_case
from experiments.bench.script import flag
from moe_jax.layers import rms_norm
from moe_jax.routing import route, router_logits
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.router import Route, reference_route_tokens, route_tokens

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes.", of=SHAPES)
    tokens: tuple[int, ...] = flag((1, 8, 64), "Tokens in the batch.", least=1, needs="as in 1,8")
    norm: bool = flag(False, "An RMSNorm first.")
    repeats: int = flag(20, "How often each time is taken; the median counts.", least=1)
    steps: int = flag(0, "Of a chain, each its own gate; 0: as L2 asks for.", least=0)
    seed: int = flag(0, "Of weights and tokens.", least=0)

    @property
    def shapes(self) -> ExpertShapes:
        return SHAPES[self.preset]


def main(settings: Settings) -> str | None:
    """Checks and times each T and variant by itself; returns a line if anything failed."""
    logging.set_verbosity(logging.WARNING)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu:
        script.make_interpreter_safe()
    console = script.make_console()
    table = Table("T", "variant", "us", "less empty", "quartiles", title=_title(settings))
    failed = 0
    for T in settings.tokens:
        failed += _report(console, f"T = {T} check", lambda T=T: _check(settings, T, not on_gpu))
        times: dict[str, timing.StepTime] = {}
        for name in reversed(VARIANTS) if on_gpu else ():

            def measure(name=name, T=T, times=times):
                chain = router_chain(settings, VARIANTS[name], T)
                times[name] = timing.measure_step(chain, settings.repeats)
                return f"{times[name].us:.2f} us"

            failed += _report(console, f"T = {T} {name}", measure)
        for name in filter(times.get, VARIANTS):
            _add_row(table, T, name, times[name], times.get("empty"))
    if on_gpu:
        console.print(table)
    seen = environment.describe(
        seed=settings.seed, repeats=settings.repeats, commit="", read_ceiling_tbps=None
    )
    console.print(
        f"{seen.device_kind}, driver {seen.driver}, jax {seen.jax}, jaxlib {seen.jaxlib}, "
        f"Python {seen.python}, commit {seen.commit}, {seen.date}",
        highlight=False,
    )
    return f"time_router: {failed} of the above failed" if failed else None


def _title(settings: Settings) -> str:
    norm = ", RMSNorm first" if settings.norm else ""
    shapes = settings.shapes
    return f"{settings.preset}: E = {shapes.E}, K = {shapes.K}, H = {shapes.H}{norm}"


def _report(console: Console, what: str, work: Callable[[], str]) -> int:
    """Prints what the work says; 1 if it fails, which must not stop the rest."""
    try:
        console.print(f"{what}: {work()}", highlight=False)
        return 0
    except Exception as error:
        console.print(f"{what} FAILED: {type(error).__name__}: {error}", markup=False)
        return 1


def _add_row(table: Table, T: int, name: str, time: timing.StepTime, empty) -> None:
    less = f"{time.us - empty.us:.2f}" if empty and name != "empty" else ""
    host = " host-bound" if time.host_bound else ""
    table.add_row(str(T), name, f"{time.us:.2f}{host}", less, f"{time.spread_us:.2f}")


def _draw(settings: Settings, T: int, seed: int) -> RouterCase:
    """A batch and a gate; norm_weight is None where no norm was asked for."""
    case = draw_router_case(T, settings.shapes.E, settings.shapes.H, seed)
    return case if settings.norm else case._replace(norm_weight=None)


def _check(settings: Settings, T: int, interpret: bool) -> str:
    """Says how the kernel and its twin agree; raises an AssertionError where they should and don't.

    A norm is left to the kernel alone: its own result is what the logits are judged by.
    """
    K = settings.shapes.K
    x, gate, norm_weight = _draw(settings, T, settings.seed)
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


def router_chain(settings: Settings, variant: Callable, T: int) -> timing.Chain:
    """A chain of steps with a gate each, enough of them that the gates come from memory."""
    shapes = settings.shapes
    steps = settings.steps or max(16, math.ceil(_COLD_BYTES / (2 * shapes.E * shapes.H)))
    cases = [_draw(settings, T, settings.seed + index) for index in range(steps)]

    def step(x, gate_and_norm):
        """The next x is this one, but it has to wait for everything."""
        found = variant(x, *gate_and_norm, shapes.K)
        return timing.after(x, (found.weights, found.ids, found.normed))

    return timing.Chain(step, cases[0].x, [(case.gate, case.norm_weight) for case in cases])


run = functools.partial(script.run, Settings, main)

if __name__ == "__main__":
    run()
