"""The config and the weights to export, from a preset or a checkpoint."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.ascend.settings import DTYPES, Settings
from moe_jax.checkpoints import Reader, open_checkpoint
from moe_jax.config import Qwen3MoeConfig
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import to_arrays
from moe_jax.presets import PRESETS
from moe_jax.quantization import fp8_config, split_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is exported.

    Attributes:
      config: with the superkernel scope that was asked for.
      dtype: of plain parameters and cache.
      params: by their flat names; None if they were not wanted.
      origin: how `weights_of` makes them again; goes to JSON.
    """

    config: Qwen3MoeConfig
    dtype: jnp.dtype
    params: dict[str, jax.Array] | None
    origin: dict[str, Any]


def load(asked: Settings) -> Loaded:
    """Reads or makes what was asked for.

    Raises:
      ValueError, OSError, NotImplementedError: the checkpoint cannot be loaded; names the file.
    """
    if asked.preset:
        config = PRESETS[asked.preset]
        if asked.weights == "fp8":
            scaled = fp8_config(config.moe_layers)
            config = dataclasses.replace(config, quantization_config=scaled)
        dtype = jnp.dtype(asked.dtype or "bfloat16")
        origin = {"preset": asked.preset, "seed": asked.seed}
    else:
        reader = open_checkpoint(asked.checkpoint, dtype=asked.dtype, dequantize=asked.dequantize)
        config, dtype = reader.config, _only_dtype(reader, asked.checkpoint)
        origin = {"checkpoint": str(asked.checkpoint.resolve())}
        origin |= {"dequantize": True} if asked.dequantize else {}
    config = dataclasses.replace(
        config,
        enable_superkernel=asked.superkernel != "off",
        **{} if asked.superkernel == "off" else {"superkernel_scope": asked.superkernel},
    )
    params = None if asked.abstract else weights_of(origin, config, dtype)
    return Loaded(config=config, dtype=dtype, params=params, origin=origin)


def weights_of(origin: dict[str, Any], config: Qwen3MoeConfig, dtype) -> dict[str, jax.Array]:
    """The parameters by name, as `origin` says.

    Raises:
      ValueError, OSError, NotImplementedError: as `load`.
    """
    if "preset" in origin:
        return to_arrays(Qwen3Moe(config, rngs=nnx.Rngs(origin["seed"]), dtype=dtype))
    dequantize = origin.get("dequantize", False)
    reader = open_checkpoint(origin["checkpoint"], dtype=dtype, dequantize=dequantize)
    return {name: jnp.asarray(reader.read(name)) for name in reader.shapes}


def _only_dtype(reader: Reader, checkpoint: pathlib.Path) -> jnp.dtype:
    plain = [struct for name, struct in reader.shapes.items() if not split_name(name)[1]]
    found = sorted({struct.dtype.name for struct in plain})
    if len(found) > 1 or found[0] not in DTYPES:
        raise ValueError(
            f"{checkpoint} holds {' and '.join(found)}; expected --dtype={' or '.join(DTYPES)} "
            "with it"
        )
    return jnp.dtype(found[0])
