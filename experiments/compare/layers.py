"""The inputs of a comparison: weights of several layers, tokens, calibrated routings."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare.byte_model import expert_bytes
from experiments.compare.routings import Routing
from experiments.compare.timing import restarts_at
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights, reference_experts

_LAYERS = 4
# What the weights may take of the device's memory; the rest is for the baselines' temporaries.
_WEIGHTS_SHARE = 0.6


def num_layers(shapes: ExpertShapes, memory_bytes: int | None) -> int:
    """How many layers to rotate over: 4, fewer where they do not fit, at least 1."""
    if memory_bytes is None:
        return _LAYERS
    fitting = int(_WEIGHTS_SHARE * memory_bytes) // (shapes.E * expert_bytes(shapes))
    return max(1, min(_LAYERS, fitting))


@functools.partial(jax.jit, static_argnames="shapes")
def make_layer(key: jax.Array, shapes: ExpertShapes) -> ExpertWeights:
    """Random bf16 weights that keep activations near 1; one expert at a time is in float32."""
    H, I = shapes.H, shapes.I

    def one_expert(expert_key):
        gate_up_key, down_key = jax.random.split(expert_key)
        gate_up = jax.random.normal(gate_up_key, (2, I, H), jnp.float32) * H**-0.5
        down = jax.random.normal(down_key, (H, I), jnp.float32) * I**-0.5
        return gate_up.astype(jnp.bfloat16), down.astype(jnp.bfloat16)

    gate_up, down = jax.lax.map(one_expert, jax.random.split(key, shapes.E))
    return ExpertWeights(gate_up=gate_up, down=down)


def make_tokens(seed: int, T: int, H: int) -> jax.Array:
    """[T, H] bf16 with a root mean square of 1."""
    return jax.random.normal(jax.random.key(seed), (T, H), jnp.float32).astype(jnp.bfloat16)


jitted_reference = jax.jit(reference_experts)


def calibrate(
    x: jax.Array, layers: Sequence[ExpertWeights], routings: Sequence[Routing]
) -> list[Routing]:
    """Scales each token's routing weights so that a chain of layers neither dies nor blows up.

    Step i's output is step i + 1's input. The size of silu(gate x) * (up x) goes with the square
    of x's, so any chain would end in zeros or infinities, and a normalisation between the steps
    would be one more kernel to time. The output is linear in the routing weights, so these are
    divided, once and ahead of time, by the size that the reference's output has.

    Args:
      x: [T, H], the input of the first step.
      layers: step i runs layers[i % len(layers)].
      routings: one for each step.
    """
    calibrated, start = [], x
    for step, routing in enumerate(routings):
        if restarts_at(step):
            x = start
        layer = layers[step % len(layers)]
        y = jitted_reference(x, layer, routing.expert_ids, routing.expert_weights)
        size = jnp.sqrt(jnp.mean(y * y, axis=1, keepdims=True))  # [T, 1]
        size = jnp.where(size > 0, size, 1)  # a token whose ids are all padding stays at zero
        weights = (routing.expert_weights / np.asarray(size)).astype(np.float32)
        calibrated.append(Routing(routing.expert_ids, weights))
        x = (y / size).astype(jnp.bfloat16)
    return calibrated
