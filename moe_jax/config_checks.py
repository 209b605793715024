"""What a config's fields may hold. Errors name the field, its value and what is accepted."""

import math
from collections.abc import Mapping

from moe_jax.activations import ACTIVATIONS
from moe_jax.rope import KINDS, REQUIRED, RopeConfig
from moe_jax.superkernel import SCOPES


class ConfigError(ValueError):
    """A config says something that no model can be."""


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


_POSITIVE = ("a positive integer", lambda value: _is_int(value) and value > 0)
_POSITIVE_OR_NONE = ("None or a positive integer", lambda v: v is None or _POSITIVE[1](v))
_COUNT = ("an integer of at least 0", lambda value: _is_int(value) and value >= 0)
_BOOL = ("True or False", lambda value: isinstance(value, bool))
_NOT_NEGATIVE = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
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


def check_config(config) -> None:
    """Raises a ConfigError unless every field of a Qwen3MoeConfig, and all together, make sense."""
    for name, (accepted, holds) in _FIELDS.items():
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{name} is {value!r}; expected {accepted}")
    layers = range(config.num_hidden_layers)
    for layer in config.mlp_only_layers:
        if not _is_int(layer) or layer < 0:
            raise ConfigError(
                f"mlp_only_layers is {config.mlp_only_layers!r}; expected layer indices, as in "
                f"{list(layers[:2])}"
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
    check_rope(config.rope)
    for name in ("short_factor", "long_factor"):
        factors = getattr(config.rope, name)
        if config.rope.kind == "longrope" and len(factors) != D // 2:
            raise ConfigError(
                f"rope's {name} has {len(factors)} numbers; expected head_dim / 2 = {D // 2}"
            )


def check_rope(rope: RopeConfig) -> None:
    """Raises a ConfigError for an unknown kind, or for settings it lacks or cannot use."""
    if rope.kind not in tuple(KINDS):
        raise ConfigError(f"rope_type is {rope.kind!r}; expected one of {sorted(KINDS)}")
    if not _is_number(rope.theta) or rope.theta <= 1:
        raise ConfigError(f"rope_theta is {rope.theta!r}; expected a number above 1")
    for name in REQUIRED[rope.kind]:
        if getattr(rope, name) is None:
            raise ConfigError(f"rope_type {rope.kind!r} needs {name}; the config has none")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        value = getattr(rope, name)
        if value is not None and (not _is_number(value) or value <= 0):
            raise ConfigError(f"rope's {name} is {value!r}; expected a number above 0")
    if rope.attention_factor is not None and not _NOT_NEGATIVE[1](rope.attention_factor):
        raise ConfigError(
            f"rope's attention_factor is {rope.attention_factor!r}; expected {_NOT_NEGATIVE[0]}"
        )
    length = rope.original_max_position_embeddings
    if length is not None and not _POSITIVE[1](length):
        raise ConfigError(
            f"rope's original_max_position_embeddings is {length!r}; expected {_POSITIVE[0]}"
        )
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if factors is not None and not all(_is_number(f) and f > 0 for f in factors):
            raise ConfigError(f"rope's {name} is {factors!r}; expected numbers above 0")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ConfigError(
            f"rope's low_freq_factor is {rope.low_freq_factor}; expected less than "
            f"high_freq_factor = {rope.high_freq_factor}"
        )
