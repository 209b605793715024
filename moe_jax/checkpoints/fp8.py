"""Block-scaled FP8 weights, as in Qwen3-30B-A3B-FP8, turned into ordinary floats.

Each linear layer has `weight` (E4M3, [out, in]) and `weight_scale_inv`, one factor for each block:
W[o, i] = weight[o, i] * weight_scale_inv[o // rows, i // columns]. A multiplication, whatever the
name says; blocks at the edges may be cut off. Router, norms, embeddings and head are not quantised.
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.checkpoints.safetensors_file import FP8

_ACCEPTED = (
    "expected quant_method 'fp8' with fmt 'e4m3', activation_scheme 'dynamic' and a "
    "weight_block_size of two positive integers"
)

# A table look-up is many times faster than a cast element by element.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def block_size(quantization_config: Mapping | None) -> tuple[int, int] | None:
    """The (rows, columns) that share a scale, or None for a checkpoint that is not quantised.

    Raises:
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    if not quantization_config:
        return None
    required = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    defaults = {"fmt": "e4m3", "activation_scheme": "dynamic"}
    for field, value in required.items():
        found = quantization_config.get(field, defaults.get(field))
        if found != value:
            raise NotImplementedError(f"quantization_config: {field} is {found!r}; {_ACCEPTED}")
    block = quantization_config.get("weight_block_size")
    whole = isinstance(block, (list, tuple)) and all(type(n) is int and n > 0 for n in block)
    if not whole or len(block) != 2:
        raise NotImplementedError(
            f"quantization_config: weight_block_size is {block!r}; {_ACCEPTED}"
        )
    return tuple(block)


def may_be_quantised(key: str) -> bool:
    """Whether a hub key names a linear layer's weight, which an FP8 checkpoint quantises."""
    return key.endswith(("_proj.weight", ".experts.gate_up_proj", ".experts.down_proj"))


def scale_key(key: str) -> str:
    """The key of the scales that belong to a quantised weight's key."""
    return f"{key}_scale_inv"


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """One scale for each block, those that the edges cut off included."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


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
      scale: the whole tensor of scales, any float dtype.
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
        wide *= scale[row_block].astype(np.float32)[column_blocks]
        out[start - rows.start : stop - rows.start] = wide
