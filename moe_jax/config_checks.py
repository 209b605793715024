"""What a config's fields may hold. Errors name the field, its value and what is accepted."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.activations import ACTIVATIONS
from moe_jax.rope import KINDS, REQUIRED, RopeConfig, attention_factor
from moe_jax.superkernel import SCOPES


class ConfigError(ValueError):
    """A config says something that no model can be."""


def shown(value: Any) -> str:
    """The value as errors show it: repr, without its middle if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4300 digits, or deep nesting
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Numbers are used in float32, where XLA takes what is below the smallest normal one for 0.
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def _is_number(value) -> bool:
    # a comparison, because converting an integer beyond float64 raises; false for NaN
    return (_is_int(value) or isinstance(value, float)) and -_LARGEST <= value <= _LARGEST


# Shapes and positions are int32.
_POSITIVE = ("a positive integer below 2**31", lambda value: _is_int(value) and 0 < value < 2**31)
_POSITIVE_OR_NONE = (f"None or {_POSITIVE[0]}", lambda v: v is None or _POSITIVE[1](v))
_COUNT = ("an integer from 0 to 2**31 - 1", lambda value: _is_int(value) and 0 <= value < 2**31)
_BOOL = ("True or False", lambda value: isinstance(value, bool))
_NOT_NEGATIVE = ("a number of at least 0, in float32", lambda v: _is_number(v) and v >= 0)
_ABOVE_0 = ("a number above 0, in float32", lambda v: _is_number(v) and v >= _SMALLEST)
_FACTORS = (
    "a list of numbers above 0, in float32",
    lambda value: isinstance(value, tuple) and all(map(_ABOVE_0[1], value)),
)
_FIELDS = {
    "vocab_size": _POSITIVE,
    "hidden_size": _POSITIVE,
    "intermediate_size": _POSITIVE,
    "num_hidden_layers": _POSITIVE,
    "num_attention_heads": _POSITIVE,
    "num_key_value_heads": _POSITIVE,
    "head_dim": _POSITIVE_OR_NONE,
    "hidden_act": (f"one of {sorted(ACTIVATIONS)}", lambda v: v in tuple(ACTIVATIONS)),
    "initializer_range": _NOT_NEGATIVE,
    "rms_norm_eps": _NOT_NEGATIVE,
    "max_position_embeddings": _POSITIVE,
    "rope": ("a RopeConfig", lambda value: isinstance(value, RopeConfig)),
    "attention_bias": _BOOL,
    "use_sliding_window": _BOOL,
    "sliding_window": _POSITIVE_OR_NONE,
    "decoder_sparse_step": _POSITIVE,
    "num_experts": _COUNT,
    "num_experts_per_tok": _POSITIVE,
    "moe_intermediate_size": _POSITIVE,
    "norm_topk_prob": _BOOL,
    "output_router_logits": _BOOL,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "tie_word_embeddings": _BOOL,
    "quantization_config": ("None or a mapping", lambda v: v is None or isinstance(v, Mapping)),
    "router_z_loss_coef": _NOT_NEGATIVE,
    "router_dtype": ("'float32' or 'model'", lambda value: value in ("float32", "model")),
    "moe_chunk_max_len": _POSITIVE_OR_NONE,
    "moe_latent_size": _POSITIVE_OR_NONE,
    "moe_shared_expert_intermediate_size": _POSITIVE_OR_NONE,
    "enable_superkernel": _BOOL,
    "superkernel_scope": (f"one of {list(SCOPES)}", lambda value: value in tuple(SCOPES)),
    "extra": ("a mapping", lambda value: isinstance(value, Mapping)),
}


# Fields of RopeConfig that may be None; `truncate` may not.
_ROPE_FIELDS = {
    "factor": _ABOVE_0,
    "low_freq_factor": _ABOVE_0,
    "high_freq_factor": _ABOVE_0,
    "beta_fast": _ABOVE_0,
    "beta_slow": _ABOVE_0,
    "attention_factor": _NOT_NEGATIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
    "original_max_position_embeddings": _POSITIVE,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}


def check_config(config) -> None:
    """Raises a ConfigError unless every field of a Qwen3MoeConfig, and all together, make sense."""
    for name, (accepted, holds) in _FIELDS.items():
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{name} is {shown(value)}; expected {accepted}")
    layers = config.mlp_only_layers
    if not isinstance(layers, tuple) or not all(_is_int(layer) and layer >= 0 for layer in layers):
        raise ConfigError(
            f"mlp_only_layers is {shown(layers)}; expected layer indices, as in [0, 1]"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_key_value_heads is {kv_heads}; expected a divisor of num_attention_heads = "
            f"{heads}"
        )
    if config.head_dim is None and config.hidden_size % heads:
        raise ConfigError(
            f"head_dim is None and hidden_size = {config.hidden_size} is no multiple of "
            f"num_attention_heads = {heads}; expected head_dim to be given"
        )
    D = config.head_dim or config.hidden_size // heads
    if D % 2 or D < 4:
        raise ConfigError(f"head_dim is {D}; expected an even number of at least 4, for RoPE")
    if config.num_experts and config.num_experts_per_tok > config.num_experts:
        raise ConfigError(
            f"num_experts_per_tok is {config.num_experts_per_tok}; expected at most num_experts = "
            f"{config.num_experts}"
        )
    if config.use_sliding_window and config.sliding_window is None:
        raise ConfigError(
            "sliding_window is None; expected a positive integer, as use_sliding_window is True"
        )
    if (width := config.extra.get("shared_expert_intermediate_size")) not in (None, 0):
        raise ConfigError(
            f"shared_expert_intermediate_size is {shown(width)}; expected 0, because a shared "
            "expert behind a gate is not implemented (moe_shared_expert_intermediate_size has none)"
        )
    check_rope(config.rope)
    _check_rope_beside(config.rope, D, config.max_position_embeddings)


def check_rope(rope: RopeConfig) -> None:
    """Raises a ConfigError for an unknown kind, or for settings it lacks or cannot use."""
    if rope.kind not in tuple(KINDS):
        raise ConfigError(f"rope_type is {shown(rope.kind)}; expected one of {sorted(KINDS)}")
    if not _is_number(rope.theta) or rope.theta <= 1:
        raise ConfigError(
            f"rope_theta is {shown(rope.theta)}; expected a number above 1, in float32"
        )
    for name in REQUIRED[rope.kind]:
        if getattr(rope, name) is None:
            raise ConfigError(f"rope_type {rope.kind!r} needs {name}; the config has none")
    for name, (accepted, holds) in _ROPE_FIELDS.items():
        value = getattr(rope, name)
        if value is not None and not holds(value):
            raise ConfigError(f"rope's {name} is {shown(value)}; expected {accepted}")
    if not isinstance(rope.truncate, bool):
        raise ConfigError(f"rope's truncate is {shown(rope.truncate)}; expected True or False")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ConfigError(
            f"rope's low_freq_factor is {rope.low_freq_factor}; expected less than "
            f"high_freq_factor = {rope.high_freq_factor}"
        )


def _check_rope_beside(rope: RopeConfig, D: int, max_position: int) -> None:
    """What check_rope cannot know without the head's size and max_position_embeddings."""
    if rope.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(rope, name)) != D // 2:
                raise ConfigError(
                    f"rope's {name} has {len(getattr(rope, name))} numbers; expected head_dim / 2 "
                    f"= {D // 2}"
                )
    try:
        scale = attention_factor(rope, max_position)
    except ZeroDivisionError:  # longrope divides by the logarithm of the original length
        scale = float("inf")
    if not _is_number(scale):
        raise ConfigError(
            f"rope's attention_factor comes to {scale}, which float32 does not hold; expected "
            "another factor, mscale or original_max_position_embeddings, or an attention_factor"
        )
