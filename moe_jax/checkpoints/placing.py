"""Arrays from the host onto devices, a shard at a time."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from moe_jax.quantization import SCALES, VALUES, split_name
from moe_jax.sharding import scales_sharding

# (parameter name, shape) -> where it goes; of a quantised parameter where its values go.
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def sharding_of(
    shardings: Shardings | None, shapes: Mapping[str, jax.ShapeDtypeStruct], array_name: str
) -> jax.sharding.Sharding | None:
    """Where an array goes; None is the default device.

    Args:
      shardings: the rule for parameters.
      shapes: of all arrays.
      array_name: a parameter's, or that of its values or scales.

    Raises:
      TypeError: the rule returned something else than a Sharding, or one that scales cannot follow.
    """
    if shardings is None:
        return None
    name, part = split_name(array_name)
    shape = shapes[name + VALUES if part else name].shape
    sharding = shardings(name, shape)
    if not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            f"shardings({name!r}, {shape}) is {sharding!r}; expected a jax.sharding.Sharding"
        )
    return scales_sharding(sharding, shapes[array_name].shape) if part == SCALES else sharding


def place(
    struct: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Makes an array from read(index) of each shard of this process's devices.

    At most one shard is on the host at a time; one that several devices hold is read once.

    Args:
      struct: the whole array's shape and dtype.
      sharding: None for one copy on the default device.
      read: slices -> that part of the array.
    """
    if sharding is None:
        return _put(read((slice(None),) * len(struct.shape)), None)
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(struct.shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, struct.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        shard = read(tuple(slice(*part) for part in bounds))
        shards += [_put(shard, device) for device in devices]
        del shard  # or it would stay until the next one is read
    return jax.make_array_from_single_device_arrays(
        struct.shape, sharding, shards, dtype=struct.dtype
    )


def _put(host: np.ndarray, device: jax.Device | None) -> jax.Array:
    # Waiting lets the caller drop the host's copy, which a transfer under way would hold on to.
    return jax.device_put(host, device).block_until_ready()
