"""Rotary position embeddings: the frequencies of every kind that a Qwen3-MoE config may name.

A kind is a function from (rope, D, max_position, longest) to D/2 inverse frequencies, all in
float32: RoPE turns the pair (x[i], x[i + D/2]) by the angle position * inverse_frequency[i].
Formulas: RoFormer (default), Chen et al. 2023 (linear), NTK-aware scaling (dynamic),
Peng et al. 2023 (yarn), Ding et al. 2024 (longrope), Llama 3.1's config (llama3).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.integers import at_least_int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """What a config says about RoPE, under its Hugging Face names; `kind` is their rope_type.

    Attributes:
      theta: the base of the frequencies.
      kind: one of KINDS.
      factor: how many times longer than the original the context may be.
      original_max_position_embeddings: the length trained on; the model's max_position_embeddings
        where a config leaves it out.
      attention_factor: what cos and sin are multiplied with (yarn, longrope); None computes it.
      beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn's.
      short_factor, long_factor: longrope's divisors, D/2 of each.
      low_freq_factor, high_freq_factor: llama3's.
      extra: keys that no kind reads, kept for writing back.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    extra: Mapping = dataclasses.field(default_factory=dict, hash=False)


def rope_tables(
    rope: RopeConfig, D: int, max_position: int, position_ids: jax.Array, dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of every position's angles, for `apply_rope`.

    dynamic and longrope take other frequencies once any row is longer than the original length:
    "longest" is the highest position in the whole batch, plus one, as Hugging Face has it.

    Args:
      rope: the kind and its settings.
      D: the head's size, even.
      max_position: the config's max_position_embeddings.
      position_ids: [1 or B, S] integers.
      dtype: of the result. Angles are float32 whatever it is: bfloat16 has no 257.

    Returns:
      cos, sin: [1 or B, S, D], scaled by the kind's attention factor.
    """
    position_ids = at_least_int32(position_ids)
    longest = jnp.max(position_ids) + 1
    frequencies = KINDS[rope.kind](rope, D, max_position, longest)  # [D/2]
    angles = position_ids[..., None].astype(jnp.float32) * frequencies  # [B, S, D/2]
    angles = jnp.concatenate([angles, angles], axis=-1)
    scale = attention_factor(rope, max_position)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each head of x [B, heads, S, D] by the tables' angles; cos, sin are [1 or B, S, D]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, None] + turned * sin[:, None]


def attention_factor(rope: RopeConfig, max_position: int) -> float:
    """What cos and sin are multiplied with: 1.0 except for yarn and longrope."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    original = rope.original_max_position_embeddings or max_position
    factor = max_position / original if rope.factor is None else rope.factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _exponents(D: int) -> np.ndarray:
    return np.arange(0, D, 2, dtype=np.float32) / np.float32(D)  # [D/2]


def _default(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    del max_position, longest
    return 1.0 / jnp.float32(rope.theta) ** _exponents(D)


def _linear(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    return _default(rope, D, max_position, longest) / float(rope.factor)


def _dynamic(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    """A larger base once the longest row is over max_position (not original_max_...)."""
    length = jnp.maximum(longest, max_position).astype(jnp.float32)
    factor = float(rope.factor)  # JAX would take an integer for an int32
    growth = factor * length / max_position - (factor - 1)
    base = float(rope.theta) * growth ** (D / (D - 2))
    return 1.0 / base ** _exponents(D)


def _yarn(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between the two."""
    original = rope.original_max_position_embeddings or max_position

    def dimension_that_turns(times: float) -> float:
        return D * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_that_turns(rope.beta_fast or 32)
    high = dimension_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step instead of a division by zero
    ramp = np.clip((np.arange(D // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = _default(rope, D, max_position, longest)
    return kept / float(rope.factor) * ramp + kept * (1 - ramp)


def _longrope(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    """Two lists of divisors: the long one once the longest row is over the original length."""
    original = rope.original_max_position_embeddings or max_position
    long, short = (np.asarray(f, np.float32) for f in (rope.long_factor, rope.short_factor))
    divisors = jnp.where(longest > original, long, short)
    return 1.0 / (divisors * jnp.float32(rope.theta) ** _exponents(D))


def _llama3(rope: RopeConfig, D: int, max_position: int, longest: jax.Array) -> jax.Array:
    """Long wavelengths divided by the factor, short ones kept, a blend between the two."""
    original = rope.original_max_position_embeddings or max_position
    factor, low, high = map(float, (rope.factor, rope.low_freq_factor, rope.high_freq_factor))
    kept = _default(rope, D, max_position, longest)
    wavelengths = 2 * math.pi / kept
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * kept / factor + blend * kept
    too_long, short = wavelengths > original / low, wavelengths < original / high
    return jnp.where(too_long, kept / factor, jnp.where(short, kept, blended))


KINDS: dict[str, Callable[[RopeConfig, int, int, jax.Array], jax.Array]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}

# What each kind cannot do without.
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
