"""Which layers and numbers of tokens are tuned, the most useful first; what one shard of them sees.

tensor shard 1/n   every expert's I / n neurons: all tokens, all experts, a narrower I
expert shard 1/n   E / n whole experts: all tokens and all K ids of each, but ids of other shards'
                   experts are padding, so that a token has K / n experts here on average
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.compare.routings import Routing, make_routings
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.api import SIZE_MULTIPLE
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.tuned_tables import BUCKETS

# One user, a small batch, a full one; then what lies between.
_USEFUL_FIRST = (1, 8, 64)


class Layer(NamedTuple):
    """A layer, or a shard of one, as decode_experts is called with it.

    Attributes:
      of: its name in the table.
      shapes: the sizes that the call sees.
      all_experts: how many experts the router chooses from, in all shards together.
    """

    of: str
    shapes: ExpertShapes
    all_experts: int


def layers_of(
    presets: tuple[str, ...], expert_shards: tuple[int, ...], tensor_shards: tuple[int, ...]
) -> list[Layer]:
    """The presets' layers, then their shards.

    Raises:
      ValueError: a layer cannot be cut into so many shards; names the flag and what is accepted.
    """
    layers = [Layer(name, SHAPES[name], SHAPES[name].E) for name in presets]
    for name in presets:
        layers += [_expert_shard(name, n) for n in expert_shards]
        layers += [_tensor_shard(name, n) for n in tensor_shards]
    return layers


def _expert_shard(preset: str, n: int) -> Layer:
    shapes = SHAPES[preset]
    if shapes.E % n or shapes.E // n < shapes.K:
        raise ValueError(
            f"--expert_shards has {n}: E = {shapes.E} of {preset} makes shards of "
            f"{shapes.E / n:g} experts; expected a whole number, at least K = {shapes.K}"
        )
    return Layer(
        f"{preset}, expert shard 1/{n}", dataclasses.replace(shapes, E=shapes.E // n), shapes.E
    )


def _tensor_shard(preset: str, n: int) -> Layer:
    shapes = SHAPES[preset]
    if shapes.I % n or shapes.I // n % SIZE_MULTIPLE:
        raise ValueError(
            f"--tensor_shards has {n}: I = {shapes.I} of {preset} makes shards of "
            f"{shapes.I / n:g} neurons; expected a multiple of {SIZE_MULTIPLE}"
        )
    return Layer(
        f"{preset}, tensor shard 1/{n}", dataclasses.replace(shapes, I=shapes.I // n), shapes.E
    )


def useful_first(tokens: tuple[int, ...]) -> list[int]:
    """The numbers of tokens in the order in which they are tuned."""
    order = [*_USEFUL_FIRST, *(T for T in BUCKETS if T not in _USEFUL_FIRST)]
    return [T for T in order if T in tokens]


def draw_routings(layer: Layer, routing: str, T: int, count: int, seed: int) -> list[Routing]:
    """Routings over all experts, as the shard of the first ones sees them: the others are -1."""
    whole = dataclasses.replace(layer.shapes, E=layer.all_experts)
    drawn = make_routings(routing, whole, T, count, seed)
    return [
        Routing(
            np.where(ids < layer.shapes.E, ids, -1).astype(np.int32),
            weights,
        )
        for ids, weights in drawn
    ]
