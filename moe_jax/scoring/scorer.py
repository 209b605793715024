"""A model and how it is computed, its compiled step, and what is kept of two models' logits."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.cache import KVCache, init_cache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.dispatch import record_choices
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import has_all_of_xla, resolve_platform
from pallas_kernels.decode_experts import override_layout

SCORING_PHASES = ("prefill", "decode")
_CAPACITY_STEP = 64  # of a cache, as the kernels of a decode step take it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model, and how it is computed.

    Attributes:
      model: its parameters are used in place.
      phase: "prefill" runs a chunk of columns at once; "decode" one token a row and step, by the
        kernels of decode steps and the cache that they read.
      experts_backend, attention_backend, layers_backend: as in Qwen3Moe.__call__.
      layout: a layout or mode of decode_experts, for the Pallas backends; None leaves it to them.
      platform: as in moe_jax.platforms.resolve_platform.

    Raises:
      ValueError: there is no such phase.
    """

    model: Qwen3Moe
    phase: str = "prefill"
    experts_backend: str = "auto"
    attention_backend: str = "auto"
    layers_backend: str = "auto"
    layout: str | None = None
    platform: str | None = None

    def __post_init__(self):
        if self.phase not in SCORING_PHASES:
            accepted = ", ".join(SCORING_PHASES)
            raise ValueError(f"phase is {self.phase!r}; expected one of {accepted}")

    @property
    def plan(self) -> "Plan":
        """What its compiled step is specialised to."""
        return Plan(
            # Without what config.json has besides, which differs by checkpoint.
            config=dataclasses.replace(self.model.config, extra={}),
            phase=self.phase,
            experts_backend=self.experts_backend,
            attention_backend=self.attention_backend,
            layers_backend=self.layers_backend,
            layout=self.layout,
            platform=resolve_platform(self.platform),
        )

    @property
    def backends(self) -> dict[str, str]:
        """What computed each op; empty before anything was scored."""
        return dict(_program(self.plan).backends)


class Plan(NamedTuple):
    """As Scorer has it, without arrays; hashable."""

    config: Qwen3MoeConfig
    phase: str
    experts_backend: str
    attention_backend: str
    layers_backend: str
    layout: str | None
    platform: str


def _advance(
    plan: Plan, parameters: dict[str, jax.Array], cache: KVCache, ids: jax.Array, valid: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Runs ids [B, n], those that are `valid` [B, n]; returns the cache and logits [B, n, V]."""
    model = from_arrays(plan.config, parameters)

    def run(cache: KVCache, ids: jax.Array, valid: jax.Array) -> tuple[KVCache, jax.Array]:
        output = model(
            ids,
            attention_mask=valid,
            cache=cache,
            output_router_logits=False,
            experts_backend=plan.experts_backend,
            attention_backend=plan.attention_backend,
            layers_backend=plan.layers_backend,
            platform=plan.platform,
        )
        return output.cache, output.logits

    def step(cache: KVCache, column: tuple[jax.Array, jax.Array]) -> tuple[KVCache, jax.Array]:
        cache, logits = run(cache, *(array[:, None] for array in column))
        return cache, logits[:, 0]

    with override_layout(plan.layout):
        if plan.phase == "prefill":
            return run(cache, ids, valid)
        unroll = not has_all_of_xla(plan.platform)  # without a loop
        cache, logits = jax.lax.scan(step, cache, (ids.T, valid.T), unroll=unroll)
    return cache, jnp.swapaxes(logits, 0, 1)


class _Program:
    """The compiled step of a plan, and which backends it took."""

    def __init__(self, plan: Plan):
        self.backends: dict[str, str] = {}
        self._step = jax.jit(functools.partial(_advance, plan), donate_argnums=1)

    def __call__(self, *arguments) -> tuple[KVCache, jax.Array]:
        with record_choices() as choices:  # of a call that is traced
            made = self._step(*arguments)
        self.backends |= {request.op: choice.backend for request, choice in choices}
        return made


@functools.cache
def _program(plan: Plan) -> _Program:
    return _Program(plan)


class Reading:
    """A scorer that reads a batch of B rows, some columns at a time."""

    def __init__(self, scorer: Scorer, B: int, longest: int):
        """Takes the rows, and the most tokens that one of them has."""
        plan = scorer.plan
        self._program, self._parameters = _program(plan), to_arrays(scorer.model)
        dtype = self._parameters["embed_tokens.weight"].dtype
        capacity = -(-longest // _CAPACITY_STEP) * _CAPACITY_STEP
        self._empty = functools.partial(init_cache, plan.config, B, capacity, dtype)
        self._cache = None

    def begin(self) -> None:
        """Forgets what was read; the next columns are the first ones."""
        self._cache = None  # before the next one takes its memory
        self._cache = self._empty()

    def advance(self, ids: np.ndarray, valid: np.ndarray) -> jax.Array:
        """[B, n, V] logits in the model's dtype after each of the next columns [B, n]."""
        self._cache, logits = self._program(self._parameters, self._cache, ids, valid)
        return logits


class LogitsScores(NamedTuple):
    """What is kept of the logits at each of [B, n] positions.

    Attributes:
      logprobs: [scorers, B, n] float32, of the targets.
      top_ids: [scorers, B, n] int32, the likeliest tokens.
      kl: [B, n] float32; None with one scorer.
    """

    logprobs: jax.Array
    top_ids: jax.Array
    kl: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def score_logits(platform: str, logits: tuple[jax.Array, ...], targets: jax.Array) -> LogitsScores:
    """Scores targets [B, n] int32 by one or two models' logits [B, n, V] of any float dtype.

    Args:
      platform: as resolve_platform returns it.
      logits: each scorer's.
      targets: negative ones give figures that mean nothing.
    """
    wide = [array.astype(jnp.float32) for array in logits]
    log_p = [jax.nn.log_softmax(array, axis=-1) for array in wide]
    index = jnp.maximum(targets, 0)[..., None]
    chosen = [jnp.take_along_axis(array, index, axis=-1)[..., 0] for array in log_p]
    top_ids = [platform_ops(platform).argmax(array) for array in wide]
    kl = kl_divergence(*log_p) if len(log_p) == 2 else None
    return LogitsScores(jnp.stack(chosen), jnp.stack(top_ids), kl)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) = sum of p log(p / q) over the last axis of two float32 log-softmaxes.

    The sum taken is of p log(p / q) - p + q, which is the same because p and q each add up to 1.
    Its terms are never negative, so an error of rounding that shifts all of log_q counts squared.
    As p log(p / q), it would be the whole of a divergence of 1e-6.
    """
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    small = jnp.abs(d) < 0.5
    near = p * (jnp.expm1(-jnp.where(small, d, 0)) + d)
    term = jnp.where(small, near, q - p + p * d)
    return jnp.sum(jnp.where(p > 0, term, q), axis=-1)
