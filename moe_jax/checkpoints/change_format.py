"""Parameters from plain to FP8 and back, one at a time, wherever they lie.

`quantised` and `dequantised` make a Reader of a Reader: what a writer reads from it is converted
then, so that no second model is in memory.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints import fp8, keys
from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.readers import Reader
from moe_jax.checkpoints.safetensors_file import FP8
from moe_jax.config import Qwen3MoeConfig
from moe_jax.quantization import SCALES, VALUES, block_of, fp8_config, is_quantised, split_name
from pallas_kernels.block_scaled_fp8 import (
    BLOCK,
    BlockScaledFp8,
    dequantise,
    quantise,
    scales_shape,
)

# Called with a parameter's name, the squared Frobenius norm of its error, and its own.
Report = Callable[[str, float, float], None]


def quantised(
    reader: Reader, *, block: tuple[int, int] = BLOCK, report: Report | None = None
) -> Reader:
    """The reader's parameters with every linear layer and expert in FP8.

    Args:
      reader: of a plain model.
      block: the (rows, columns) that share a scale.
      report: called for each parameter when it is quantised.

    Raises:
      CheckpointError: the reader's model is in FP8 already; from read, a weight is not finite, and
        the message names the tensor.
    """
    already = [name for name in reader.shapes if name.endswith(VALUES)]
    if already:
        raise CheckpointError(f"{already[0]} and others are FP8 already; expected plain parameters")
    settings = fp8_config(reader.config.moe_layers, block)
    config = dataclasses.replace(reader.config, quantization_config=settings)
    shapes = {}
    for name, struct in reader.shapes.items():
        if not is_quantised(name, settings):
            shapes[name] = struct
            continue
        of_scales = scales_shape(struct.shape, block)
        shapes[name + SCALES] = jax.ShapeDtypeStruct(of_scales, np.float32)
        shapes[name + VALUES] = jax.ShapeDtypeStruct(struct.shape, FP8)

    @functools.lru_cache(maxsize=1)  # values and scales are read one after the other
    def converted(name: str) -> dict[str, np.ndarray]:
        values, scales, error, norm = _quantise_parts(name, reader.read(name), block)
        if report is not None:
            report(name, error, norm)
        return {VALUES: values, SCALES: scales}

    def read(array_name: str) -> np.ndarray:
        name, part = split_name(array_name)
        return converted(name)[part] if part else reader.read(name)

    return Reader(config, shapes, read)


def _quantise_parts(
    name: str, weight: np.ndarray, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Values, scales, and the squared norms of error and weight; a matrix at a time."""
    values = np.empty(weight.shape, FP8)
    scales = np.empty(scales_shape(weight.shape, block), np.float32)
    error = norm = 0.0
    for position, key in keys.hub_keys(name, weight.shape).items():
        found, is_finite, *squares = _quantise(weight[position], block)
        if not is_finite:
            raise CheckpointError(f"{key} has an inf or NaN; expected finite numbers to quantise")
        values[position], scales[position] = found.values, found.scales
        error, norm = error + float(squares[0]), norm + float(squares[1])
    return values, scales, error, norm


@functools.partial(jax.jit, static_argnums=1)
def _quantise(weight: jax.Array, block: tuple[int, int]):
    found, wide = quantise(weight, block), weight.astype(jnp.float32)
    error = jnp.sum(jnp.square(dequantise(found) - wide))
    return found, jnp.all(jnp.isfinite(wide)), error, jnp.sum(jnp.square(wide))


def dequantised(reader: Reader, dtype=None) -> Reader:
    """The reader's parameters with every one in FP8 as a plain one of `dtype`, bfloat16 by default.

    Values are exactly what BlockScaledFp8 means, rounded once.
    """
    plain, shapes = jnp.dtype(dtype or jnp.bfloat16), {}
    block = block_of(reader.config.quantization_config)
    for array_name, struct in reader.shapes.items():
        name, part = split_name(array_name)
        if part == VALUES:
            shapes[name] = jax.ShapeDtypeStruct(struct.shape, plain)
        elif not part:
            shapes[name] = struct

    def read(name: str) -> np.ndarray:
        if name in reader.shapes:
            return reader.read(name)
        values, scales = reader.read(name + VALUES), reader.read(name + SCALES)
        out = np.empty(values.shape, plain)
        whole = tuple(slice(0, size) for size in values.shape[-2:])
        for stack in np.ndindex(values.shape[:-2]):
            fp8.dequantise(values[stack], scales[stack], block, whole, out[stack])
        return out

    config = dataclasses.replace(reader.config, quantization_config=None)
    return Reader(config, {name: shapes[name] for name in keys.in_layer_order(shapes)}, read)


_dequantise = jax.jit(dequantise, static_argnums=1)


def dequantised_arrays(
    config: Qwen3MoeConfig, arrays: dict[str, jax.Array], dtype=None
) -> tuple[Qwen3MoeConfig, dict[str, jax.Array]]:
    """The same of a model's arrays on their devices; `arrays` loses those in FP8 one by one."""
    block, plain = block_of(config.quantization_config), jnp.dtype(dtype or jnp.bfloat16)
    for name in [name for name in arrays if name.endswith(VALUES)]:
        name = name.removesuffix(VALUES)
        weight = BlockScaledFp8(
            values=arrays.pop(name + VALUES), scales=arrays.pop(name + SCALES), block=block
        )
        arrays[name] = _dequantise(weight, plain)
    return dataclasses.replace(config, quantization_config=None), arrays
