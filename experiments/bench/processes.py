"""Several processes that compute together by jax.distributed: who finds whom, and who writes files.

Each holds the same program's Python; what they compute together is arrays over all their devices.
"""

import contextlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

# Others wait for the first at the end, which still scores and writes a checkpoint.
_SHUTDOWN_S = 3600


def join(coordinator: str, processes: int, process_id: int) -> None:
    """Joins the others, before JAX makes its devices: on GPUs over NCCL, on CPUs over Gloo.

    Args:
      coordinator: host:port of the first process.
      processes: how many there are.
      process_id: this one's, from 0; the first one is the coordinator.

    Raises:
      RuntimeError: the others do not come.
    """
    jax.distributed.initialize(
        coordinator, processes, process_id, shutdown_timeout_seconds=_SHUTDOWN_S
    )


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The block runs in the first process and then in the others, which find what it wrote."""
    together = jax.process_count() > 1
    if together and not is_first():
        multihost_utils.sync_global_devices("the first process has gone first")
    yield
    if together and is_first():
        multihost_utils.sync_global_devices("the first process has gone first")


def whole_here(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that lie on a mesh, on one device of this process; all processes call it together."""
    if jax.process_count() > 1:
        host = multihost_utils.process_allgather(dict(params), tiled=True)
    else:
        host = jax.device_get(dict(params))
    return {name: jnp.asarray(array) for name, array in host.items()}
