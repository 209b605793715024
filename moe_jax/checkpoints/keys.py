"""Our parameters' names and the hub's keys: one stacked expert array is many tensors there."""

import re

_EXPERTS = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)")

# Tensors that some files hold and no Qwen3-MoE reads: buffers that follow from config.json.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"


def hub_keys(name: str, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """Where each part of a parameter lies on the hub: leading indices -> key.

    layers.0.mlp.experts.gate_up [E, 2, I, H] has parts (e, 0), the gates, and (e, 1), the ups, of
    [I, H] each; layers.0.mlp.experts.down [E, H, I] has parts (e,). Any other parameter is one
    part, ().
    """
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
