"""Parameters that are read one at a time: what every writer of a checkpoint takes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints import keys
from moe_jax.checkpoints.errors import CheckpointError, Problems
from moe_jax.config import Qwen3MoeConfig
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import parameter_shapes, to_arrays

# Called as progress(done_bytes, total_bytes) while parameters are read or written.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model's parameters, wherever they lie.

    Attributes:
      config: the model's.
      shapes: array name, as moe_jax.parameters has it -> shape and dtype, in the model's order.
      read: name -> the whole array on the host, not to be written to.
    """

    config: Qwen3MoeConfig
    shapes: dict[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(map(bytes_of, self.shapes.values()))


def bytes_of(struct: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array with this shape and dtype."""
    return struct.size * struct.dtype.itemsize


def counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """count(nbytes), to be called for each part that is done: adds up and tells `progress`."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return count


def of_model(model: Qwen3Moe) -> Reader:
    """A model's parameters, copied from its devices one at a time.

    Raises:
      CheckpointError: they do not fit model.config, or lie partly on another host.
    """
    arrays = to_arrays(model)
    expected = parameter_shapes(model.config)
    problems = Problems()
    for name in expected.keys() - arrays.keys():
        problems.add("missing", name)
    for name in arrays.keys() - expected.keys():
        problems.add("unexpected", name)
    for name in expected.keys() & arrays.keys():
        if arrays[name].shape != expected[name].shape:
            found, wanted = list(arrays[name].shape), list(expected[name].shape)
            problems.add("shape", f"{name} is {found}; expected {wanted}")
        if not arrays[name].is_fully_addressable:
            problems.add("other host", f"{name}; expected every shard on this one")
    problems.raise_if_any("the model does not fit its config")
    shapes = {
        name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
        for name in keys.in_layer_order(arrays)
    }
    return Reader(model.config, shapes, lambda name: host_copy(arrays[name]))


def host_copy(array: jax.Array) -> np.ndarray:
    """The array on the host, put together from its shards.

    np.asarray(array) would keep that copy for as long as the array lives, and a model's copies
    would add up; addressable_data makes a new handle each time, and its copy goes with it.
    """
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(shard.data.addressable_data(0))
    return whole


def expect_float(dtype, what: str = "dtype") -> np.dtype:
    """The numpy dtype of a float that models are stored in.

    Raises:
      CheckpointError: another dtype.
    """
    accepted = ("bfloat16", "float32", "float16")
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in accepted:
        raise CheckpointError(f"{what} is {dtype!r}; expected one of {', '.join(accepted)}")
    return found
