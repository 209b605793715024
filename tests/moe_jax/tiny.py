"""The tiny model that tests share, and one jitted call of it, compiled once for each shape."""

import dataclasses
import functools

import chex
import jax
from flax import nnx

from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.presets import PRESETS

TINY = PRESETS["tiny"]
WINDOWED = dataclasses.replace(TINY, use_sliding_window=True, sliding_window=5)
B, S = 2, 11


@functools.cache
def model_of(config, dtype="float32") -> Qwen3Moe:
    """Weights several times larger than at initialisation, so that experts and heads differ."""
    model = Qwen3Moe(dataclasses.replace(config, initializer_range=0.15), rngs=nnx.Rngs(3))
    arrays = {name: array.astype(dtype) for name, array in to_arrays(model).items()}
    return from_arrays(config, arrays)


@functools.partial(jax.jit, static_argnames=("keep", "backend", "extras"))
def run(model, ids, cache=None, mask=None, labels=None, replay=None, *, keep=0, backend="auto",
        extras=False):  # fmt: skip
    return model(
        ids,
        cache=cache,
        attention_mask=mask,
        labels=labels,
        replay=replay,
        logits_to_keep=keep,
        experts_backend=backend,
        output_router_logits=extras,
        output_routings=extras,
        output_hidden_states=extras,
    )


def random_ids(seed=0, shape=(B, S)):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
