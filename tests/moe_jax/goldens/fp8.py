"""Block-quantised checkpoints, as the published FP8 models are: W = float8 * scale, per block."""

import numpy as np
import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def is_quantised(key: str) -> bool:
    """Routers, norms, embeddings and lm_head stay as they are; every other linear is float8."""
    return key.endswith("_proj.weight")


def quantise(
    tensors: dict[str, torch.Tensor], block: tuple[int, int], scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of an FP8 checkpoint: `.weight` in float8 beside `.weight_scale_inv`."""
    found = {}
    for key, tensor in tensors.items():
        if not is_quantised(key):
            found[key] = tensor.to(scale_dtype)
            continue
        scale = _largest_of_blocks(tensor, block).div(LARGEST).to(scale_dtype)
        quotient = tensor / spread(scale, block, tensor.shape)
        found[key] = quotient.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        found[key + "_scale_inv"] = scale
    return found


def dequantise(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The float32 weights that such a checkpoint means."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith("_scale_inv"):
            continue
        found[key] = tensor.float()
        if is_quantised(key):
            found[key] *= spread(tensors[key + "_scale_inv"], block, tensor.shape)
    return found


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple) -> torch.Tensor:
    """One scale for each element; the last block of a row or column may be cut short."""
    rows, columns = (np.arange(size) // length for size, length in zip(shape, block, strict=True))
    return scale.float()[rows][:, columns]


def _largest_of_blocks(tensor: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows = [part.abs().amax(0) for part in tensor.split(block[0], 0)]
    columns = torch.stack(rows).split(block[1], 1)
    return torch.stack([part.amax(1) for part in columns], dim=1)
