"""Our parameters' names and the hub's keys: one stacked expert array is many tensors there.

A quantised parameter NAME is NAME.values and NAME.scales here, KEY and KEY_scale_inv there.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from moe_jax.quantization import SCALES, VALUES

_EXPERTS = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)")

# Tensors that some files hold and no Qwen3-MoE reads: buffers that follow from config.json.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")

EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"


class Place(NamedTuple):
    """Where a part of a parameter lies: all of a tensor, or some rows of one expert in it.

    Attributes:
      key: the tensor's.
      expert: an index of the tensor's first dimension; None if the part is the whole tensor.
      row: the part's first row there.
    """

    key: str
    expert: int | None = None
    row: int = 0


class Stored(NamedTuple):
    """How the hub's files store a parameter.

    Attributes:
      shapes: hub key -> the tensor's shape, for each tensor that holds some of it.
      places: leading indices of the parameter -> where the rest of its dimensions lie.
    """

    shapes: dict[str, tuple[int, ...]]
    places: dict[tuple[int, ...], Place]


def hub_keys(name: str, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """Where each part of a parameter lies on the hub: leading indices -> key.

    layers.0.mlp.experts.gate_up [E, 2, I, H] has parts (e, 0), the gates, and (e, 1), the ups, of
    [I, H] each; layers.0.mlp.experts.down [E, H, I] has parts (e,). Any other parameter is one
    part, (). Values have the keys of their parameter, and scales those with another ending.
    """
    if name.endswith(SCALES):
        keys = hub_keys(name.removesuffix(SCALES), shape)
        return {position: scale_key(key) for position, key in keys.items()}
    name = name.removesuffix(VALUES)
    match = _EXPERTS.fullmatch(name)
    if not match:
        return {(): name if name == HEAD_KEY else f"model.{name}"}
    experts, kind = match.groups()
    parts = {(0,): "gate_proj", (1,): "up_proj"} if kind == "gate_up" else {(): "down_proj"}
    return {
        (e, *part): f"model.{experts}.{e}.{projection}.weight"
        for e in range(shape[0])
        for part, projection in parts.items()
    }


def apart(name: str, shape: tuple[int, ...]) -> Stored:
    """A parameter as published files store it: by hub_keys, each part a tensor of its own."""
    parts = hub_keys(name, shape)
    return Stored(
        {key: shape[len(position) :] for position, key in parts.items()},
        {position: Place(key) for position, key in parts.items()},
    )


def scale_key(key: str) -> str:
    """The key of the scales that belong to a quantised weight's key."""
    return f"{key}_scale_inv"


def fused_key(name: str) -> str | None:
    """The key under which transformers 5 fuses all experts of a parameter; None for others."""
    return f"model.{name}_proj" if _EXPERTS.fullmatch(name) else None


def fused(name: str, shape: tuple[int, ...]) -> Stored:
    """Stacked experts in one tensor, as transformers 5 holds and may save them.

    layers.0.mlp.experts.gate_up is gate_up_proj [E, 2 * I, H] there, an expert's gates before its
    ups; down is down_proj [E, H, I].
    """
    key, (E, *_, rows, columns) = fused_key(name), shape
    if len(shape) == 3:
        return Stored({key: shape}, {(e,): Place(key, e) for e in range(E)})
    halves = {(e, half): Place(key, e, half * rows) for e in range(E) for half in range(2)}
    return Stored({key: (E, 2 * rows, columns)}, halves)


def layer_of(name: str) -> int:
    """The layer that a parameter's name or hub key speaks of; -1 for one of no layer."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def layer_count(names: Iterable[str]) -> int:
    """One more than the highest layer that the names or hub keys speak of."""
    return max(map(layer_of, names), default=-1) + 1


def is_ignored(key: str) -> bool:
    """Whether a file may hold this key although no parameter reads it."""
    return _BUFFERS.fullmatch(key) is not None


def in_layer_order(names) -> list[str]:
    """The names as the model reads them: embedding, layers by number, final norm, head."""

    def place(name: str) -> tuple:
        first, _, rest = name.partition(".")
        if first == "layers":
            number, _, rest = rest.partition(".")
            return 1, int(number), rest
        return {"embed_tokens": 0, "norm": 2, "lm_head": 3}.get(first, 4), 0, rest

    return sorted(names, key=place)
