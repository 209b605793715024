"""The two compiled functions of generation: prefill of a chunk of the prompts, and a decode step.

Both run the model on new tokens, then choose the next one, so a decode step's input never leaves
the device. They are compiled once for each Plan and shape; lengths, sampling values, seeds and stop
ids are arrays. The cache and the history of tokens are donated: the caller's are gone after.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.cache import KVCache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.generation.logits_processors import NO_TOKEN, TokenHistory
from moe_jax.generation.sampling import Steps, choose
from moe_jax.parameters import from_arrays
from moe_jax.platform_ops import platform_ops
from moe_jax.traces import RoutingTrace, trace_of


class Plan(NamedTuple):
    """What a compiled function is specialised to, beside shapes; hashable.

    Attributes:
      config: the model's.
      steps: which of the logits processors apply.
      backend: the experts' backend.
      platform: as resolve_platform returns it.
      capture: whether to return which experts were chosen.
    """

    config: Qwen3MoeConfig
    steps: Steps
    backend: str
    platform: str
    capture: bool


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
    """What a compiled function returns; trace has the experts of the tokens it ran on, or None."""

    sampled: Sampled
    state: DecodeState
    trace: RoutingTrace | None


def _prefill(
    plan: Plan, inputs: StepInputs, state: DecodeState, ids: jax.Array, valid: jax.Array
) -> Step:
    """Runs ids [B, S], padded on the left as `valid` [B, S] says.

    What is chosen means something after the last chunk only. The earlier chunks choose too, for
    nothing: that costs less than to compile the model a second time without.
    """
    rows = jnp.ones(ids.shape[0], bool)
    return _advance(plan, inputs, state, ids, valid, rows, jnp.int32(0))


def _decode(
    plan: Plan, inputs: StepInputs, state: DecodeState, last: Sampled, alive: jax.Array
) -> Step:
    """Runs the last tokens. Rows that are not active, or not alive [B] bool, stay as they are."""
    active = last.active & alive
    return _advance(
        plan, inputs, state, last.tokens[:, None], active[:, None], active, last.index + 1
    )


def _advance(plan: Plan, inputs: StepInputs, state: DecodeState, ids, valid, active, index) -> Step:
    model = from_arrays(plan.config, inputs.parameters)
    ops = platform_ops(plan.platform)
    history = state.history.append(ids, valid, ops)
    output = model(
        ids,
        attention_mask=valid,
        cache=state.cache,
        logits_to_keep=1,
        output_router_logits=False,
        output_routings=plan.capture,
        experts_backend=plan.backend,
        platform=plan.platform,
    )
    with jax.named_scope("choose"):
        logits = output.logits[:, -1]  # [B, V]
        tokens = choose(logits, history, inputs.keys, index, plan.steps, inputs.values, ops)
        stops = jnp.any(tokens[:, None] == inputs.stop_ids, axis=-1)
    trace = trace_of(output.routings) if plan.capture else None
    active = active & (tokens != NO_TOKEN) & ~stops
    return Step(Sampled(tokens, active, index), DecodeState(output.cache, history), trace)


# How both are compiled; a step's inputs that it returns anew are donated.
JIT = {"static_argnums": 0, "donate_argnums": 2}
prefill = jax.jit(_prefill, **JIT)
decode = jax.jit(_decode, **JIT)
