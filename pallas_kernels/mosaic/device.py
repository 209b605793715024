"""The GPU that a kernel is compiled for, and the one way to launch a kernel on it."""

import contextlib
import contextvars
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax._src.pallas import mpmd  # plgpu.kernel has no argument for outputs in place
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import layout_search  # noqa: F401  which makes lowering fast

# What one thread block may hold on Hopper, less a reserve for barriers and reduction scratch.
SHARED_MEMORY_BYTES = 232448 - 4096

# Shared memory for sums over several warps. Reductions here are of few numbers, and with less of it
# three blocks of 72 KB fit on a core.
_COMPILER_PARAMS = plgpu.CompilerParams(reduction_scratch_bytes=1024)

WARPGROUP = "warpgroup"  # the axis of a block's warpgroups, where it has several

_H100_CORES = 132
# The interpreter runs blocks one after the other, so more of them only take more time.
_INTERPRETED_CORES = 2

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreting", default=False)


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    num_blocks: int,
    out_type: Any,
    scratch_types: Any = (),
    in_place: Mapping[int, int] = types.MappingProxyType({}),
    num_warpgroups: int = 1,
    interpret: Any,
) -> Callable[..., Any]:
    """Returns a function of the inputs that runs `kernel` in `num_blocks` thread blocks.

    Args:
      kernel: kernel(block_id, *inputs, *outputs, *scratch); the arrays are refs.
      name: of the kernel, as profiles and lowered text show it.
      num_blocks: thread blocks in the grid.
      out_type: a ShapeDtypeStruct for each output.
      scratch_types: shared memory and barriers, a sequence or a dict of keyword arguments.
      in_place: index of an input -> index of the output that is the same memory, both counted
        without those that are None. The kernel gets a ref for each of the two. What it does not
        write keeps the input's values. XLA copies an input first that is used later.
      num_warpgroups: of a block; with several, axis WARPGROUP says which one runs.
      interpret: a bool or an InterpretGPUParams. Interpreted, the primitives of this package take
        the forms that a CPU can run.

    Raises:
      RuntimeError: the CPU client has too few threads to interpret several warpgroups.
    """
    params = plgpu.InterpretGPUParams() if interpret is True else interpret or None

    def body(*refs, **scratch):
        if params is not None and num_warpgroups > 1:
            _expect_threads(name, num_warpgroups)
        with _interpreted_forms(params is not None):
            kernel(lax.axis_index("block"), *refs, **scratch)

    mesh = {"grid": (num_blocks,), "grid_names": ("block",), "kernel_name": name}
    if num_warpgroups > 1:
        mesh |= {"num_threads": num_warpgroups, "thread_name": WARPGROUP}
    if in_place:
        return _launch_in_place(body, plgpu.Mesh(**mesh), out_type, scratch_types, in_place, params)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        compiler_params=_COMPILER_PARAMS,
        interpret=params,
        **mesh,
    )


def _expect_threads(name: str, num_warpgroups: int) -> None:
    """Raises a RuntimeError where interpreted warpgroups could wait for each other for ever.

    Each that waits blocks a thread of JAX's CPU client, which has one for each core, or as many as
    the environment variable NPROC said when it was made.
    """
    needed = 2 * num_warpgroups
    threads = int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))
    if threads < needed:
        raise RuntimeError(
            f"{name} has {num_warpgroups} warpgroups, and interpreting them takes {needed} threads "
            f"of JAX's CPU client; it has {threads}: set NPROC={needed} in the environment before "
            "JAX is used"
        )


def _launch_in_place(body, mesh, out_type, scratch_types, in_place, params) -> Callable[..., Any]:
    """plgpu.kernel with outputs in place; it does not run under jax.vmap."""

    def body_with_scratch(*refs):
        types_by_name = scratch_types if isinstance(scratch_types, Mapping) else {}
        types_in_order = () if isinstance(scratch_types, Mapping) else scratch_types

        def scoped(*scratch, **scratch_by_name):
            body(*refs, *scratch, **scratch_by_name)

        pl.run_scoped(scoped, *types_in_order, **types_by_name)

    return mpmd._mpmd_map(
        [(mesh, body_with_scratch)],
        out_type,
        input_output_aliases=dict(in_place),
        compiler_params=_COMPILER_PARAMS,
        interpret=params,
        name=mesh.kernel_name,
    )


@contextlib.contextmanager
def _interpreted_forms(interpreted: bool) -> Iterator[None]:
    token = _interpreting.set(interpreted)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether the kernel whose body is being traced will be interpreted."""
    return _interpreting.get()


def check_interpret(interpret: Any) -> None:
    """Raises a TypeError unless an op's `interpret` is one that `launch` takes."""
    if not isinstance(interpret, (bool, plgpu.InterpretGPUParams)):
        raise TypeError(f"interpret is {interpret!r}; expected a bool or an InterpretGPUParams")


def core_count(interpret: Any = False) -> int:
    """Cores (SMs) of the GPU that is compiled for; an H100's where none can be asked.

    Interpreted, a kernel that cuts its work by cores gets a few blocks only.
    """
    if interpret:
        return _INTERPRETED_CORES
    device = jax.devices()[0]
    if device.platform == "gpu":
        return device.core_count
    described = jax.sharding.get_abstract_mesh().abstract_device
    return (described and described.num_cores) or _H100_CORES


def device_kind() -> str:
    """The kind of the GPU that is compiled for; the default device's where none can be asked."""
    device = jax.devices()[0]
    described = jax.sharding.get_abstract_mesh().abstract_device
    if device.platform == "gpu" or described is None:
        return device.device_kind
    return described.device_kind


# The letter in a data-centre GPU's name -> its major compute capability.
_CAPABILITIES = {"A": 8, "L": 8, "H": 9, "B": 10}
HOPPER = _CAPABILITIES["H"]
ANY = tuple(sorted(set(_CAPABILITIES.values())))


def capability_of(device_kind: str) -> int | None:
    """The major compute capability of a kind of GPU; None for one whose name does not say it.

    "NVIDIA H100 80GB HBM3" is 9. Hopper's (9) tensor cores have wgmma and no other's have; the copy
    engine (TMA) is there from 9 on.
    """
    found = re.search(r"\bG?([ALHB])\d{2,3}", device_kind)
    return _CAPABILITIES[found[1]] if found else None


def expect_capability(
    what: str,
    capabilities: Sequence[int],
    others: Mapping[str, Sequence[int]],
    interpret: Any = False,
) -> None:
    """Raises a NotImplementedError if the GPU that is compiled for is known to lack instructions.

    Args:
      what: whose kernel, for the message.
      capabilities: the major compute capabilities that it compiles for.
      others: what may be taken instead, by name, and their capabilities.
      interpret: as in launch; the interpreter lacks none.
    """
    kind = device_kind()
    found = capability_of(kind)
    if interpret or found is None or found in capabilities:
        return
    accepted = " or ".join(f"{capability}.x" for capability in capabilities)
    able = [name for name, theirs in others.items() if found in theirs]
    raise NotImplementedError(
        f"{what} is for GPUs of compute capability {accepted}; {kind} has {found}.x, where "
        f"{' or '.join(able) or 'nothing else'} runs"
    )
