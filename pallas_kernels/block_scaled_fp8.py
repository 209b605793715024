"""The quantised weight format: E4M3 values, and a float32 factor for each block of them.

A weight is either a plain array, [..., out, in], or a BlockScaledFp8 of that shape:
W[o, i] = values[o, i] * scales[o // rows, i // columns]. Blocks at the edges may be cut off.
"""

import dataclasses

import jax
import jax.numpy as jnp

VALUES_DTYPE = jnp.float8_e4m3fn
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
    *_, rows, columns = weight.shape
    scales = jnp.repeat(weight.scales, weight.block[0], axis=-2)[..., :rows, :]
    scales = jnp.repeat(scales, weight.block[1], axis=-1)[..., :columns]
    return (weight.values.astype(jnp.float32) * scales).astype(dtype)
