"""The two functions that are exported: a prefill of fixed length, and a greedy decode step.

Their arguments and results are plain dictionaries and tuples, so that a serialised artifact can be
read by JAX alone. A cache is {"keys": one [B, kv, C, D] a layer, "lengths": [B] int32, "values":
like keys}; "params" are the model's parameters under their flat names.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.cache import KVCache, init_cache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.platform_ops import platform_ops

PLATFORM = "ascend"
PHASES = ("prefill", "decode")

# How XLA compiles it where it runs here. By default XLA leaves out roundings to bfloat16, and which
# ones depends on where a scope ends; so it rounds as the StableHLO says.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

Cache = dict[str, Any]
Results = dict[str, Any]


def prefill(
    config: Qwen3MoeConfig,
    params: Mapping[str, jax.Array],
    input_ids: jax.Array,
    attention_mask: jax.Array,
    cache: Cache,
) -> Results:
    """Runs prompts [B, S] int32, padded on the left where attention_mask [B, S] int32 is 0.

    Returns:
      As decode_step does, after each prompt's last token.
    """
    return _advance(config, params, input_ids, cache, attention_mask)


def decode_step(
    config: Qwen3MoeConfig,
    params: Mapping[str, jax.Array],
    input_ids: jax.Array,
    cache: Cache,
) -> Results:
    """Runs one token a row, input_ids [B, 1] int32.

    Returns:
      {"cache": after these tokens, "logits": [B, V] in the model's dtype, "next_ids": [B] int32,
      the largest logit's index, the first of equal ones}.
    """
    return _advance(config, params, input_ids, cache, None)


def _advance(config, params, input_ids, cache, attention_mask) -> Results:
    output = from_arrays(config, params)(
        input_ids,
        attention_mask=attention_mask,
        cache=KVCache(**cache),
        logits_to_keep=1,
        output_router_logits=False,
        platform=PLATFORM,
        # Named, because the environment may ask for other backends elsewhere.
        experts_backend="portable",
        attention_backend="xla",
    )
    logits = output.logits[:, 0]  # [B, V]
    return {
        "cache": {name: getattr(output.cache, name) for name in cache},
        "logits": logits,
        "next_ids": platform_ops(PLATFORM).argmax(logits),
    }


@functools.cache
def jitted(config: Qwen3MoeConfig, phase: str) -> Callable[..., Results]:
    """The phase's function of the arguments that `abstract_arguments` lists, in that order.

    One for each config and phase, so that it is compiled once.

    Every argument is kept, used or not, so that an artifact's arguments are what its manifest says.
    """
    function = {"prefill": prefill, "decode": decode_step}[phase]
    named = functools.partial(function, config)
    named.__name__ = phase  # of the module
    return jax.jit(named, keep_unused=True, compiler_options=COMPILER_OPTIONS)


def empty_cache(config: Qwen3MoeConfig, B: int, capacity: int, dtype) -> Cache:
    """A cache without tokens, as the exported functions take it."""
    made = init_cache(config, B, capacity, dtype)
    return {"keys": made.keys, "lengths": made.lengths, "values": made.values}


def abstract_arguments(
    config: Qwen3MoeConfig, phase: str, *, B: int, capacity: int, S: int, dtype
) -> dict[str, Any]:
    """Shapes and dtypes of a phase's arguments, in calling order; allocates nothing.

    Args:
      B: rows.
      capacity: of the cache, in tokens.
      S: the prompts' length, for the prefill.
      dtype: of parameters and cache.
    """
    tokens = S if phase == "prefill" else 1
    arguments = {
        "params": parameter_shapes(config, dtype),
        "input_ids": jax.ShapeDtypeStruct((B, tokens), jnp.int32),
    }
    if phase == "prefill":
        arguments["attention_mask"] = jax.ShapeDtypeStruct((B, tokens), jnp.int32)
    arguments["cache"] = jax.eval_shape(lambda: empty_cache(config, B, capacity, dtype))
    return arguments
