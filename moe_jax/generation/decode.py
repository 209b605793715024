"""The compiled functions of generation: `begin`, prefill of a chunk of the prompts, decode steps.

Prefill and decode run the model on new tokens, then choose the next one, so a decode step's input
never leaves the device. All are compiled once for each Plan and shape; lengths, sampling values,
seeds and stop ids are arrays. Cache and history of tokens are donated: the caller's are gone after.

One dispatch runs several decode steps, because a host may need longer for a dispatch than a GPU for
a step. `loop_for` decides how.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.cache import KVCache, init_cache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.generation.logits_processors import NO_TOKEN, TokenHistory
from moe_jax.generation.logprobs import StepLogprobs, logprobs_of, no_logprobs
from moe_jax.generation.sampling import Steps, choose, row_keys
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import has_all_of_xla
from moe_jax.traces import RoutingTrace, trace_of

# Decode steps of a dispatch, where it is not said: 8 of Qwen3-30B-A3B take an H100 20 ms or more,
# and a slow host needs 7 ms for a dispatch. On a CPU a step of such a model hides its dispatch.
_DEFAULT_STEPS = {"cuda": 8}


class Loop(NamedTuple):
    """The decode steps of one dispatch; hashable.

    Attributes:
      most_steps: 1 is no loop.
      exits_early: whether the loop ends when no row goes on, or when the steps asked for are done.
        Else it always runs most_steps; those beyond change nothing.
    """

    most_steps: int = 1
    exits_early: bool = False

    def counts(self, total: int) -> Iterator[int]:
        """The steps to ask of each dispatch, `total` together.

        The first ones are few if that makes them shorter, so that text begins to show at once.
        """
        count = 1 if self.exits_early else self.most_steps
        while total > 0:
            yield min(count, total)
            total -= count
            count = min(2 * count, self.most_steps)


def loop_for(platform: str, steps: int | None, capacity: int) -> Loop:
    """The Loop of a platform as resolve_platform returns it; the only place that decides it.

    Args:
      platform: one without all of XLA gets no loop.
      steps: the most of a dispatch; None takes what suits the platform.
      capacity: of the cache, which no row takes more steps than.
    """
    most = min(_DEFAULT_STEPS.get(platform, 1) if steps is None else steps, capacity)
    if most == 1 or not has_all_of_xla(platform):
        return Loop()
    # XLA's GPU runtime reads a data-dependent condition on the host before each step. The host then
    # waits for the device, and the next dispatch cannot be prepared meanwhile.
    return Loop(most, exits_early=platform != "cuda")


class Plan(NamedTuple):
    """What a compiled function is specialised to, beside shapes; hashable.

    Attributes:
      config: the model's.
      steps: which of the logits processors apply.
      backend: the experts' backend.
      platform: as resolve_platform returns it.
      capture: whether to return which experts were chosen.
      loop: of the decode steps; prefill has none.
      logprobs: how many of the likeliest tokens to return log-probabilities of, beside the chosen
        token's; None computes none.
      empty_cache: whether the cache is known to hold no token.
      unpadded: whether all of prefill's tokens are known to be valid.
      parallelism: the mesh, or None for one device.
    """

    config: Qwen3MoeConfig
    steps: Steps
    backend: str
    platform: str
    capture: bool
    loop: Loop = Loop()
    logprobs: int | None = None
    empty_cache: bool = False
    unpadded: bool = False
    parallelism: Parallelism | None = None


class StepInputs(NamedTuple):
    """Arrays that stay the same during a call of `stream`.

    Attributes:
      parameters: by name, as moe_jax.parameters has them.
      values: of the Sampling.
      keys: [B] random keys.
      stop_ids: [N] int32; negative ones match nothing.
    """

    parameters: dict[str, jax.Array]
    values: dict[str, jax.Array]
    keys: jax.Array
    stop_ids: jax.Array


class DecodeState(NamedTuple):
    """Arrays that each step takes over from the one before, by donation.

    Attributes:
      cache: of B rows.
      history: the rows' tokens, as far as the logits processors look at them.
    """

    cache: KVCache
    history: TokenHistory


class Sampled(NamedTuple):
    """The tokens that a step sampled.

    Attributes:
      tokens: [B] int32; NO_TOKEN where the logits allow no choice.
      active: [B] bool, rows that go on: the token is there and is no stop id.
      index: int32, the tokens' number in their rows.
    """

    tokens: jax.Array
    active: jax.Array
    index: jax.Array


class Step(NamedTuple):
    """What a chunk of prefill returns.

    Attributes:
      sampled: the next tokens.
      state: after the tokens that ran.
      trace: the experts of the tokens that ran, or None.
      logprobs: of the next tokens, with a first axis of one step, or None.
    """

    sampled: Sampled
    state: DecodeState
    trace: RoutingTrace | None
    logprobs: StepLogprobs | None


class Decoded(NamedTuple):
    """What a dispatch of N = most_steps decode steps returns; fewer of them may have run.

    Attributes:
      tokens: [N, B] int32, sampled by each step; to be ignored where `ran` is False.
      ran: [N, B] bool, the rows that each step ran for. A step that is False in all rows has
        changed nothing.
      traces: arrays [N, MoE layers, B, K], or None; rows that a step did not run for have ids -1.
      logprobs: of `tokens`, arrays [N, B] and [N, B, n], or None; to be ignored as they are.
      sampled: by the last step that ran.
      state: after these steps.
    """

    tokens: jax.Array
    ran: jax.Array
    traces: RoutingTrace | None
    logprobs: StepLogprobs | None
    sampled: Sampled
    state: DecodeState


def _begin(
    plan: Plan,
    capacity: int,
    dtype: jnp.dtype,
    values: dict[str, np.ndarray],
    seeds: np.ndarray,
    places: np.ndarray,
    stop_ids: np.ndarray,
) -> tuple[StepInputs, DecodeState]:
    """What a call of `stream` starts from: inputs without parameters, a state without tokens.

    One program makes all of it, because array by array it takes the host 16 ms for 48 layers.

    Args:
      plan: prefill's.
      capacity, dtype: of the cache.
      values, stop_ids: as in StepInputs.
      seeds, places: [B] uint32, of each row's key.
    """
    config, B = plan.config, seeds.shape[0]
    cache = init_cache(config, B, capacity, dtype)
    state = DecodeState(cache, plan.steps.empty_history(B, config.vocab_size, capacity))
    inputs = StepInputs({}, values, row_keys(seeds, places), stop_ids)
    return _on_mesh((inputs, state), plan.parallelism)


def _prefill(
    plan: Plan, inputs: StepInputs, state: DecodeState, ids: jax.Array, valid: jax.Array
) -> Step:
    """Runs ids [B, S], padded on the left as `valid` [B, S] says.

    What is chosen means something after the last chunk only. The earlier chunks choose too, for
    nothing: that costs less than to compile the model a second time without.
    """
    rows = jnp.ones(ids.shape[0], bool)
    made = _advance(plan, inputs, state, ids, valid, rows, jnp.int32(0))
    return made._replace(logprobs=jax.tree.map(lambda array: array[None], made.logprobs))


# tokens, ran, traces and logprobs of Decoded, or of one step without their first axis.
_Results = tuple[jax.Array, jax.Array, RoutingTrace | None, StepLogprobs | None]


class _Carry(NamedTuple):
    """Of the loop: the step's number in it, and what Decoded has."""

    index: jax.Array
    state: DecodeState
    last: Sampled
    results: _Results


def _decode(
    plan: Plan,
    inputs: StepInputs,
    state: DecodeState,
    last: Sampled,
    alive: jax.Array,
    count: jax.Array,
) -> Decoded:
    """Runs the last tokens, then what they lead to: up to `count` steps.

    Args:
      alive: [B] bool. Rows that are not alive, or not active in `last`, stay as they are.
      count: int32, from 1 to most_steps.
    """
    N = plan.loop.most_steps

    def step(index: jax.Array | int, state: DecodeState, last: Sampled) -> tuple[Step, _Results]:
        active = last.active & alive & (index < count)  # [B]
        ids, valid = last.tokens[:, None], active[:, None]
        made = _advance(plan, inputs, state, ids, valid, active, last.index + 1)
        return made, (made.sampled.tokens, active, made.trace, made.logprobs)

    if N == 1:
        made, results = step(0, state, last)
        return Decoded(*jax.tree.map(lambda result: result[None], results), *made[:2])

    def go_on(carry: _Carry) -> jax.Array:
        return (carry.index < count) & jnp.any(carry.last.active & alive)

    def body(carry: _Carry) -> _Carry:
        made, results = step(carry.index, carry.state, carry.last)
        # Beyond `count` a row that goes on must stay active for the next dispatch.
        last = jax.tree.map(
            lambda new, old: jnp.where(carry.index < count, new, old), made.sampled, carry.last
        )
        results = jax.tree.map(
            lambda stored, new: jax.lax.dynamic_update_index_in_dim(stored, new, carry.index, 0),
            carry.results,
            results,
        )
        return _Carry(carry.index + 1, made.state, last, results)

    carry = _Carry(jnp.int32(0), state, last, _no_results(plan, last.tokens.shape[0]))
    if plan.loop.exits_early:
        carry = jax.lax.while_loop(go_on, body, carry)
    else:
        carry = jax.lax.fori_loop(0, N, lambda _, carry: body(carry), carry)
    return Decoded(*carry.results, carry.last, carry.state)


def _no_results(plan: Plan, B: int) -> _Results:
    """Of N steps that have not run."""
    N, config = plan.loop.most_steps, plan.config
    tokens, ran = jnp.full((N, B), NO_TOKEN, jnp.int32), jnp.zeros((N, B), bool)
    logprobs = None if plan.logprobs is None else no_logprobs(N, B, plan.logprobs)
    if not plan.capture:
        return tokens, ran, None, logprobs
    shape = (N, len(config.moe_layers), B, config.num_experts_per_tok)
    ids, weights = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
    return tokens, ran, RoutingTrace(expert_ids=ids, expert_weights=weights), logprobs


def _advance(plan: Plan, inputs: StepInputs, state: DecodeState, ids, valid, active, index) -> Step:
    model = from_arrays(plan.config, inputs.parameters)
    ops = platform_ops(plan.platform)
    history = state.history.append(ids, valid, ops)
    output = model(
        ids,
        attention_mask=None if plan.unpadded else valid,
        cache=state.cache,
        empty_cache=plan.empty_cache,
        logits_to_keep=1,
        output_router_logits=False,
        output_routings=plan.capture,
        experts_backend=plan.backend,
        platform=plan.platform,
        parallelism=plan.parallelism,
    )
    with jax.named_scope("choose"):
        logits = output.logits[:, -1]  # [B, V]
        tokens = choose(logits, history, inputs.keys, index, plan.steps, inputs.values, ops)
        stops = jnp.any(tokens[:, None] == inputs.stop_ids, axis=-1)
    trace = trace_of(output.routings) if plan.capture else None
    logprobs = None
    if plan.logprobs is not None:
        with jax.named_scope("logprobs"):
            logprobs = logprobs_of(logits, tokens, plan.logprobs, ops)
    active = active & (tokens != NO_TOKEN) & ~stops
    state = DecodeState(output.cache, history)
    return _on_mesh(Step(Sampled(tokens, active, index), state, trace, logprobs), plan.parallelism)


def _on_mesh(made: Any, parallelism: Parallelism | None) -> Any:
    """The same pytree, laid out on the mesh: a cache as the layers need it, the rest whole.

    States always lie alike, because a step of another placement would be compiled anew. What the
    host reads is whole in every process.
    """
    if parallelism is None:
        return made
    whole = parallelism.sharding()

    def shardings(part: Any) -> Any:
        if not isinstance(part, KVCache):
            return whole
        layers = (parallelism.cache_sharding(part.lengths.shape[0]),) * len(part.keys)
        return KVCache(keys=layers, values=layers, lengths=whole)

    shardings = jax.tree.map(shardings, made, is_leaf=lambda part: isinstance(part, KVCache))
    return jax.lax.with_sharding_constraint(made, shardings)


begin = jax.jit(_begin, static_argnums=(0, 1, 2))
# How the others are compiled; the state, which they return anew, is donated.
JIT = {"static_argnums": 0, "donate_argnums": 2}
prefill = jax.jit(_prefill, **JIT)
decode = jax.jit(_decode, **JIT)
