"""FP8 weights for tests, by NumPy and ml_dtypes, because JAX would compile a program for each."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.quantization import block_of, is_quantised
from pallas_kernels.block_scaled_fp8 import BlockScaledFp8

E4M3 = ml_dtypes.float8_e4m3fn


def in_format_of(config, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A plain model's arrays in the format that a config's quantization_config says."""
    found = {}
    for name, array in arrays.items():
        if is_quantised(name, config.quantization_config):
            weight = quantised(array, block_of(config.quantization_config))
            found |= {f"{name}.values": weight.values, f"{name}.scales": weight.scales}
        else:
            found[name] = array
    return found


def quantised(weight, block) -> BlockScaledFp8:
    """[..., out, in] as values and scales: a block's largest value becomes 448."""
    weight = np.asarray(weight, np.float32)
    *stack, rows, columns = weight.shape
    R, C = -(-rows // block[0]), -(-columns // block[1])
    scales = np.empty((*stack, R, C), np.float32)
    for r, c in np.ndindex(R, C):
        part = weight[..., r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
        largest = np.abs(part).max((-2, -1))
        scales[..., r, c] = np.where(largest == 0, 1, largest / np.float32(448))
    values = (weight / spread(scales, weight.shape, block)).astype(E4M3)
    return BlockScaledFp8(values=values, scales=scales, block=block)


def dequantised(weight: BlockScaledFp8, dtype=np.float32) -> np.ndarray:
    """What it means: the product in float32, rounded once."""
    scales = spread(np.asarray(weight.scales), weight.shape, weight.block)
    return (np.asarray(weight.values).astype(np.float32) * scales).astype(dtype)


def spread(scales, shape, block) -> np.ndarray:
    """Each value's scale."""
    rows, columns = (np.arange(n) // b for n, b in zip(shape[-2:], block, strict=True))
    return scales[..., rows, :][..., columns]
