"""RoPE's two spellings in config.json: rope_theta + rope_scaling (v4) and rope_parameters (v5)."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from moe_jax.config_checks import ConfigError, check_rope, shown
from moe_jax.rope import RopeConfig

# RopeConfig's fields that have their own name in the files too.
_SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(RopeConfig)
    if field.name not in ("theta", "kind", "extra")
)
_HAS_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")


def take_from(rest: dict[str, Any]) -> RopeConfig:
    """Removes every RoPE key from a config's fields and returns what they say.

    As transformers does: rope_scaling wins over rope_parameters, a theta inside over one outside,
    rope_type over type, and an original length outside over one inside.

    Raises:
      ConfigError: an unknown kind, or a setting that the kind needs and lacks.
    """
    outer_theta = rest.pop("rope_theta", None)
    v5, v4 = rest.pop("rope_parameters", None), rest.pop("rope_scaling", None)
    for name, value in (("rope_parameters", v5), ("rope_scaling", v4)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {shown(value)}; expected null or a mapping of settings")
    settings = dict(v4 or v5 or {})
    inner_kind, old_kind = settings.pop("rope_type", None), settings.pop("type", None)
    kind = inner_kind or old_kind or "default"
    theta = settings.pop("rope_theta", None)
    theta = outer_theta if theta is None else theta
    if settings.pop("partial_rotary_factor", rest.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor is set; expected 1: Qwen3-MoE turns whole heads")
    outer_length = rest.get("original_max_position_embeddings")
    if outer_length is not None and kind in _HAS_ORIGINAL_LENGTH:
        settings["original_max_position_embeddings"] = outer_length
    fields = {name: settings.pop(name) for name in _SETTINGS if settings.get(name) is not None}
    for name in ("short_factor", "long_factor"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    if settings:
        warnings.warn(
            f"RoPE settings {sorted(settings, key=str)} are read by no kind: kept, and not used",
            stacklevel=3,
        )
    if theta is not None:
        fields["theta"] = theta
    rope = RopeConfig(kind=kind, **fields, extra=settings)
    check_rope(rope)
    return rope


def spell(rope: RopeConfig, spelling: str) -> dict[str, Any]:
    """The config.json keys for `rope` in spelling "v4" or "v5"."""
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name in _SETTINGS
        if (value := getattr(rope, name)) is not None and (name, value) != ("truncate", True)
    } | dict(rope.extra)
    if spelling == "v5":
        return {"rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **settings}}
    scaling = {"rope_type": rope.kind, **settings} if settings or rope.kind != "default" else None
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
