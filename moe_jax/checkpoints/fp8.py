"""Block-scaled FP8 weights as the hub's files hold them, such as Qwen3-30B-A3B-FP8's.

Each linear layer has `weight` (E4M3, [out, in]) and `weight_scale_inv`, one factor for each block:
W[o, i] = weight[o, i] * weight_scale_inv[o // rows, i // columns]. A multiplication, whatever the
name says; blocks at the edges may be cut off. A scale is a float, or a power of two in one byte
(E8M0, 2^(byte - 127), as float8_e8m0fnu or uint8). All are float32 in memory, which holds each.
"""

import numpy as np

from moe_jax.checkpoints.hugging_face_files import FLOATS
from moe_jax.checkpoints.safetensors_file import E8M0, FP8

# What scales are stored in, by numpy dtype.
SCALES = FLOATS | {E8M0: "float8_e8m0fnu", np.dtype(np.uint8): "uint8"}

# A table look-up is many times faster than a cast element by element.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def float32_scales(stored: np.ndarray) -> np.ndarray:
    """Scales of a dtype in SCALES as float32, exactly; NaN where E8M0 has it."""
    if stored.dtype == np.uint8:
        stored = stored.view(E8M0)
    return stored.astype(np.float32)


def dequantise(
    weight: np.ndarray,
    scale: np.ndarray,
    block: tuple[int, int],
    index: tuple[slice, slice],
    out: np.ndarray,
) -> None:
    """Writes rows and columns `index` of the dequantised weight into `out`.

    The product is taken in float32 and rounded once, to out's dtype. Works through one row of
    blocks at a time, so that the float32 copy stays small.

    Args:
      weight: [out, in] E4M3, the whole tensor.
      scale: the whole tensor of scales, of a dtype in SCALES.
      block: (rows, columns) that share a scale.
      index: slices with start and stop, step 1.
      out: an array of index's shape.
    """
    rows, columns = index
    column_blocks = np.arange(columns.start, columns.stop) // block[1]
    for row_block in range(rows.start // block[0], -(-rows.stop // block[0])):
        start = max(rows.start, row_block * block[0])
        stop = min(rows.stop, (row_block + 1) * block[0])
        wide = _VALUES[weight[start:stop, columns].view(np.uint8)]
        wide *= float32_scales(scale[row_block])[column_blocks]
        out[start - rows.start : stop - rows.start] = wide
