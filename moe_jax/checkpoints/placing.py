"""Arrays from the host onto devices, a shard at a time."""

from collections.abc import Callable

import jax
import numpy as np

# (parameter name, shape) -> where it goes.
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def sharding_of(
    shardings: Shardings | None, name: str, shape: tuple[int, ...]
) -> jax.sharding.Sharding | None:
    """Where a parameter goes; None is the default device.

    Raises:
      TypeError: the rule returned something else than a Sharding.
    """
    if shardings is None:
        return None
    sharding = shardings(name, shape)
    if not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            f"shardings({name!r}, {shape}) is {sharding!r}; expected a jax.sharding.Sharding"
        )
    return sharding


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
