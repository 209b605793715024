"""The tiny model that tests share, and one jitted call of it, compiled once for each shape."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.presets import PRESETS

TINY = PRESETS["tiny"]
WINDOWED = dataclasses.replace(TINY, use_sliding_window=True, sliding_window=5, num_hidden_layers=1)
B, S = 2, 11


def random_arrays(config, dtype="float32", seed=3) -> dict[str, jax.Array]:
    """Weights several times larger than at initialisation, so that experts and heads differ.

    They are NumPy's, because JAX would compile a program for each shape.
    """
    rng = np.random.default_rng(seed)
    return {
        name: jnp.ones(s.shape, dtype)
        if name.endswith("norm.weight")
        else jnp.asarray(rng.normal(size=s.shape) * 0.15, dtype)
        for name, s in parameter_shapes(config).items()
    }


@functools.cache
def model_of(config, dtype="float32") -> Qwen3Moe:
    return from_arrays(config, random_arrays(config, dtype))


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
    ids = np.random.default_rng(seed).integers(TINY.vocab_size, size=shape)
    return jnp.asarray(ids, jnp.int32)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
