"""The quantised weight format: E4M3 values, and a float32 factor for each block of them.

A weight is either a plain array, [..., out, in], or a BlockScaledFp8 of that shape:
W[o, i] = values[o, i] * scales[o // rows, i // columns]. Blocks at the edges may be cut off.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

VALUES_DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0  # of e4m3, which has no infinity
BLOCK = (128, 128)  # of the published checkpoints: (rows, columns) that share a scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaledFp8:
    """A weight in FP8. Shape, ndim and dtype are those of the values.

    Attributes:
      values: [..., out, in] float8_e4m3fn.
      scales: [..., ceil(out / rows), ceil(in / columns)] float32, to multiply values with.
      block: the (rows, columns) that share a scale.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(default=BLOCK, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


Weight = jax.Array | BlockScaledFp8


def is_fp8(node: Any) -> bool:
    """Whether a pytree's node is a BlockScaledFp8."""
    return isinstance(node, BlockScaledFp8)


def holds_fp8(tree: Any) -> bool:
    """Whether a pytree has a BlockScaledFp8 somewhere."""
    return any(map(is_fp8, jax.tree.leaves(tree, is_leaf=is_fp8)))


def in_whole_blocks(weight: BlockScaledFp8) -> bool:
    """Whether a weight is in blocks of BLOCK, and none is cut off: what the kernels take."""
    sizes = zip(weight.shape[-2:], BLOCK, strict=True)
    return tuple(weight.block) == BLOCK and not any(size % of for size, of in sizes)


def scales_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """[..., ceil(out / rows), ceil(in / columns)] of a weight [..., out, in]."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block[0]), -(-columns // block[1]))


def check_block_scaled_fp8(name: str, weight: BlockScaledFp8) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes of values and scales are right."""
    if weight.values.dtype != VALUES_DTYPE:
        raise TypeError(f"{name}.values has dtype {weight.values.dtype}; expected float8_e4m3fn")
    if weight.scales.dtype != jnp.float32:
        raise TypeError(f"{name}.scales has dtype {weight.scales.dtype}; expected float32")
    if weight.values.ndim < 2:
        raise ValueError(f"{name}.values has shape {weight.shape}; expected [..., out, in]")
    expected = scales_shape(weight.shape, weight.block)
    if weight.scales.shape != expected:
        raise ValueError(
            f"{name}.scales has shape {weight.scales.shape}; expected {expected}, one for each "
            f"block of {weight.block} values of {weight.shape}"
        )


def dequantise(weight: Weight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The weight as a plain array [..., out, in] of `dtype`.

    The product of value and scale is taken in float32 and rounded once. A plain array is cast.
    """
    if not isinstance(weight, BlockScaledFp8):
        return jnp.asarray(weight).astype(dtype)
    scales = _spread(weight.scales, weight.shape, weight.block)
    return (weight.values.astype(jnp.float32) * scales).astype(dtype)


def quantise(weight: jax.Array, block: tuple[int, int] = BLOCK) -> BlockScaledFp8:
    """The weight [..., out, in] in FP8: each block's largest value becomes 448, e4m3's largest.

    A block's scale is its largest absolute value / 448 in float32, and 1 where all are 0. Values
    are rounded to nearest, ties to even. The weight must be finite.
    """
    *stack, rows, columns = weight.shape
    wide = weight.astype(jnp.float32)
    *_, R, C = scales_shape(weight.shape, block)
    edges = [(0, 0)] * len(stack) + [(0, R * block[0] - rows), (0, C * block[1] - columns)]
    blocks = jnp.pad(jnp.abs(wide), edges).reshape(*stack, R, block[0], C, block[1])
    largest = jnp.max(blocks, axis=(-3, -1))
    # No constant, because XLA would multiply with its reciprocal, which differs by a bit.
    divisor = jnp.where(largest == 0, 1, LARGEST)
    scales = jnp.where(largest == 0, 1, largest) / divisor
    # At least the smallest normal number, because XLA may take what is below it for 0.
    scales = jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    scaled = jnp.clip(wide / _spread(scales, weight.shape, block), -LARGEST, LARGEST)
    return BlockScaledFp8(
        values=_rounded(scaled).astype(VALUES_DTYPE), scales=scales, block=tuple(block)
    )


def _spread(scales: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """Each value's scale: [..., R, C] to [..., out, in]."""
    scales = jnp.repeat(scales, block[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(scales, block[1], axis=-1)[..., : shape[-1]]


def _rounded(x: jax.Array) -> jax.Array:
    """float32 numbers that e4m3 holds, so that no backend's conversion rounds once more.

    e4m3 has 3 bits of mantissa, and multiples of 2^-9 below 2^-6.
    """
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 2.0**9) * 2.0**-9, normal)
