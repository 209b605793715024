"""What a layer is run on: weights, tokens, routings, and float32 references to compare with.

Timed inputs are a chain's (see timing.py): weights of several layers in rotation, a new routing for
each step. `draw_case` is for one call at a small size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import routings as routings_module
from experiments.bench.routings import DrawnRouting, Traffic
from experiments.bench.timing import Step, restarts_at
from pallas_kernels.block_scaled_fp8 import quantise
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights, reference_experts

# After this number of steps a chain starts again from its first tokens. The layer squares its
# input's size, so a candidate's own rounding doubles with each step: calibrated routing weights
# hold the activations' size for 8 steps and not for 16.
RESTART_EVERY = 8
_LAYERS = {"bf16": 4, "fp8": 8}  # as many bytes
# What the weights may take of the device's memory; the rest is for the baselines' temporaries.
_WEIGHTS_SHARE = 0.6
# Twice the L2 cache of an H100 or H200.
_COLD_BYTES = 100e6
# At least this many outputs are compared, so that one lucky routing does not decide.
_ACCURACY_ELEMENTS = 512
# Accuracy inputs are drawn from other seeds than the timed ones.
_ACCURACY_SEED = 1_000_003

# Compiled once for each shape; called as it is, it would compile at every call.
jitted_reference = jax.jit(reference_experts)


class Case(NamedTuple):
    """What decode_experts and reference_experts take, in their order."""

    x: jax.Array  # [T, H]
    weights: ExpertWeights
    expert_ids: jax.Array  # [T, K]
    expert_weights: jax.Array  # [T, K]

    def tokens(self, which) -> "Case":
        """The same layer with only these tokens, in this order."""
        return self._replace(
            x=self.x[which],
            expert_ids=self.expert_ids[which],
            expert_weights=self.expert_weights[which],
        )


def draw_case(shapes: ExpertShapes, T: int, seed: int) -> Case:
    """Normal x and weights, distinct experts for each token, routing weights in [0.1, 1).

    Weights are in the shapes' format.
    """
    E, K, H, I = shapes.E, shapes.K, shapes.H, shapes.I
    keys = jax.random.split(jax.random.key(seed), 5)
    normal, bfloat16 = jax.random.normal, jnp.bfloat16
    return Case(
        x=normal(keys[0], (T, H), bfloat16),
        weights=_in_format(
            shapes,
            normal(keys[1], (E, 2, I, H), bfloat16) * jnp.asarray(H**-0.5, bfloat16),
            normal(keys[2], (E, H, I), bfloat16) * jnp.asarray(I**-0.5, bfloat16),
        ),
        expert_ids=jnp.argsort(jax.random.uniform(keys[3], (T, E)))[:, :K].astype(jnp.int32),
        expert_weights=jax.random.uniform(keys[4], (T, K), minval=0.1),
    )


def _in_format(shapes: ExpertShapes, gate_up: jax.Array, down: jax.Array) -> ExpertWeights:
    """The weights as the shapes' format has them."""
    if shapes.weights == "fp8":
        return ExpertWeights(gate_up=quantise(gate_up), down=quantise(down))
    return ExpertWeights(gate_up=gate_up.astype(jnp.bfloat16), down=down.astype(jnp.bfloat16))


def case_specs(shapes: ExpertShapes, T: int) -> Case:
    """The same as shapes and dtypes only; allocates nothing."""
    return jax.eval_shape(lambda: draw_case(shapes, T, 0))


@functools.partial(jax.jit, static_argnames="shapes")
def draw_weights(key: jax.Array, shapes: ExpertShapes) -> ExpertWeights:
    """Random weights that keep activations near 1, in the shapes' format, drawn on the device.

    One expert at a time is in float32, so that the largest layers fit.
    """
    H, I = shapes.H, shapes.I

    def one_expert(expert_key):
        gate_up_key, down_key = jax.random.split(expert_key)
        gate_up = jax.random.normal(gate_up_key, (2, I, H), jnp.float32) * H**-0.5
        down = jax.random.normal(down_key, (H, I), jnp.float32) * I**-0.5
        return _in_format(shapes, gate_up, down)

    return jax.lax.map(one_expert, jax.random.split(key, shapes.E))


def draw_layers(shapes: ExpertShapes, seed: int, count: int | None = None) -> list[ExpertWeights]:
    """The weights of `count` layers; by default 4 (8 in FP8), or as many as fit, at least 1."""
    if count is None:
        memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        count = num_layers(shapes, memory)
    keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(count)]
    return [jax.block_until_ready(draw_weights(key, shapes)) for key in keys]


def num_layers(shapes: ExpertShapes, memory_bytes: int | None) -> int:
    """How many layers to rotate over on a device of so much memory."""
    most = _LAYERS[shapes.weights]
    if memory_bytes is None:
        return most
    layer_bytes = shapes.E * routings_module.expert_bytes(shapes)
    return max(1, min(most, int(_WEIGHTS_SHARE * memory_bytes) // layer_bytes))


def draw_tokens(seed: int, T: int, H: int) -> jax.Array:
    """[T, H] bf16 with a root mean square of 1."""
    return jax.random.normal(jax.random.key(seed), (T, H), jnp.float32).astype(jnp.bfloat16)


def layer_step(layer: Callable) -> Step:
    """A layer (x, weights, expert_ids, expert_weights) -> y as the step of a chain."""

    def step(x, inputs):
        return layer(x, *inputs).astype(jnp.bfloat16)

    return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Everything that candidates share at T tokens of one routing.

    Attributes:
      x: [T, H], what a chain's first step takes.
      steps: (weights, expert_ids, expert_weights) of each step of a chain.
      traffic: of the steps' routings.
      bytes_before_reuse: the fewest bytes that a chain reads before it reads an expert again.
      cases: fresh inputs of the first layer, to take errors on.
      references: their outputs in float32, [T, H] each.
    """

    T: int
    x: jax.Array
    steps: list[tuple[ExpertWeights, jax.Array, jax.Array]]
    traffic: Traffic
    bytes_before_reuse: float
    cases: list[Case]
    references: list[np.ndarray]

    @property
    def is_cold(self) -> bool:
        """Whether every read comes from memory and none from L2."""
        return self.bytes_before_reuse >= _COLD_BYTES


def draw_inputs(
    shapes: ExpertShapes,
    layers: Sequence[ExpertWeights],
    T: int,
    *,
    routing: str,
    seed: int,
    num_steps: int,
    num_cases: int,
    all_experts: int | None = None,
) -> LayerInputs:
    """Draws the inputs; the same arguments give the same ones.

    Args:
      shapes: the layer's sizes, of a shard where it is one.
      layers: the weights to rotate over.
      T: tokens.
      routing: as make_routings takes it.
      seed: of tokens and routings.
      num_steps: of a chain, each with its own routing.
      num_cases: how many fresh inputs, at least.
      all_experts: how many the router chooses from, if the layer is a shard of the first ones.
    """
    whole = dataclasses.replace(shapes, E=all_experts or shapes.E)

    def draw(count: int, seed: int) -> list[DrawnRouting]:
        drawn = routings_module.make_routings(routing, whole, T, count, seed)
        return routings_module.of_first_shard(drawn, shapes.E) if all_experts else drawn

    timed = draw(num_steps, seed)
    x = draw_tokens(seed, T, shapes.H)
    # A shard has no expert of some tokens: more routings, or all outputs might be zeros.
    least = num_cases * (whole.E // shapes.E)
    count = max(least, -(-_ACCURACY_ELEMENTS // (T * shapes.H)))
    cases = [
        Case(
            draw_tokens(seed + _ACCURACY_SEED + index, T, shapes.H),
            layers[0],
            *map(jnp.asarray, routed),
        )
        for index, routed in enumerate(draw(count, seed + _ACCURACY_SEED))
    ]
    return LayerInputs(
        T=T,
        x=x,
        steps=[
            (layers[index % len(layers)], *map(jnp.asarray, routed))
            for index, routed in enumerate(calibrate(x, layers, timed))
        ],
        traffic=routings_module.traffic(timed, shapes),
        bytes_before_reuse=routings_module.bytes_before_reuse(timed, len(layers), shapes),
        cases=cases,
        references=[np.asarray(jitted_reference(*case)) for case in cases],
    )


def calibrate(
    x: jax.Array, layers: Sequence[ExpertWeights], routings: Sequence[DrawnRouting]
) -> list[DrawnRouting]:
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
        if restarts_at(step, RESTART_EVERY):
            x = start
        layer = layers[step % len(layers)]
        y = jitted_reference(x, layer, routing.expert_ids, routing.expert_weights)
        size = jnp.sqrt(jnp.mean(y * y, axis=1, keepdims=True))  # [T, 1]
        size = jnp.where(size > 0, size, 1)  # a token whose ids are all padding stays at zero
        weights = (routing.expert_weights / np.asarray(size)).astype(np.float32)
        calibrated.append(DrawnRouting(routing.expert_ids, weights))
        x = (y / size).astype(jnp.bfloat16)
    return calibrated
