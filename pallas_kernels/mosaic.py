"""The few version-touchy corners of Mosaic GPU that the kernels share."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# What one thread block may hold on Hopper, less a reserve for barriers and reduction scratch.
SHARED_MEMORY_BYTES = 232448 - 4096


def interpret_params(interpret: Any) -> plgpu.InterpretGPUParams | None:
    """Turns an op's `interpret` (a bool or InterpretGPUParams) into what plgpu.kernel takes."""
    if isinstance(interpret, bool):
        return plgpu.InterpretGPUParams() if interpret else None
    return interpret


def tma_ring(
    num_steps: int,
    num_slots: int,
    *,
    barrier: Any,
    copy: Callable[[jax.Array, jax.Array, Any], None],
    consume: Callable[[jax.Array, jax.Array, Any], Any],
    init: Any,
    active: Callable[[jax.Array], jax.Array] | None = None,
    wgmmas_in_flight: int | None = None,
) -> Any:
    """Streams `num_steps` tiles through a ring of `num_slots` shared-memory slots.

    1. Fill: start the copies of the first num_slots steps.
    2. For each step: wait until its slot has arrived, consume it, and start the next copy into a
       slot that nothing can still be reading: this step's own, if consume loads it into registers;
       the previous step's, if consume leaves wgmmas running.

    Args:
      num_steps: how many tiles to stream.
      num_slots: slots in the ring; at least 2 with wgmmas in flight.
      barrier: a Barrier with num_barriers=num_slots, whose num_arrivals is the number of copies
        that one call of `copy` starts.
      copy: copy(step, slot, barrier) starts the TMA copies of that step into that slot.
      consume: consume(step, slot, carry) -> carry.
      init: the first carry.
      active: active(step) says whether a step is copied and consumed at all; None means always.
      wgmmas_in_flight: how many of one step's wgmmas may still run when the next step begins; None
        if consume starts none. A wgmma is asynchronous and does not wait for earlier ones, so
        without this wait a slot would be refilled under the tensor core's eyes; no simulator here
        sees that race.

    Returns:
      The last carry.
    """

    def start(step, slot):
        if active is None:
            copy(step, slot, barrier.at[slot])
        else:
            pl.when(active(step))(lambda: copy(step, slot, barrier.at[slot]))

    def wait_and_consume(step, slot, carry):
        plgpu.barrier_wait(barrier.at[slot])
        return consume(step, slot, carry)

    def consume_if_active(step, slot, carry):
        if active is None:
            return wait_and_consume(step, slot, carry)
        return lax.cond(
            active(step), wait_and_consume, lambda _, __, carry: carry, step, slot, carry
        )

    fill_ring(num_slots, num_steps, start)
    return drain_ring(
        num_slots,
        0,
        num_steps,
        num_steps,
        copy=start,
        consume=consume_if_active,
        init=init,
        wgmmas_in_flight=wgmmas_in_flight,
    )


def fill_ring(num_slots: int, end, copy: Callable[[Any, Any], None], first: int = 0) -> None:
    """Starts the copies of steps `first` to num_slots - 1, as far as they lie below `end`."""
    for step in range(first, num_slots):
        if isinstance(end, int):
            if step < end:
                copy(jnp.int32(step), jnp.int32(step))
        else:
            pl.when(step < end)(functools.partial(copy, jnp.int32(step), jnp.int32(step)))


def drain_ring(
    num_slots: int,
    first,
    count,
    end,
    *,
    copy: Callable[[Any, Any], None],
    consume: Callable[[Any, Any, Any], Any],
    init: Any,
    wgmmas_in_flight: int | None = None,
) -> Any:
    """Consumes steps first to first + count - 1 of a filled ring, keeping it filled up to `end`.

    A kernel of several phases calls it once for each stretch of steps; what lies between two calls
    runs while the next stretch's tiles are on their way. Step s lies in slot s % num_slots.

    Args:
      num_slots: slots in the ring; at least 2 with wgmmas in flight.
      first: the first step to consume; its copy was started, and so were the next num_slots - 1.
      count: how many steps to consume.
      end: no step from `end` on is copied.
      copy: copy(step, slot) starts the copies of that step into that slot.
      consume: consume(step, slot, carry) -> carry waits until the slot has arrived, and uses it.
      init: the first carry.
      wgmmas_in_flight: as in tma_ring. At the end nothing is in flight any more.

    Returns:
      The last carry.
    """
    lag = 1 if wgmmas_in_flight else 0
    slots = jnp.int32(num_slots)

    def refill_after(step, condition):
        @pl.when(condition & (step + num_slots < end))
        def _():
            if wgmmas_in_flight is None:
                plgpu.commit_smem()  # every lane's loads come before the copy engine's writes
            copy(step + num_slots, lax.rem(step, slots))

    def body(index, carry):
        step = first + index
        carry = consume(step, lax.rem(step, slots), carry)
        if wgmmas_in_flight is not None:
            plgpu.wgmma_wait(wgmmas_in_flight)
        refill_after(step - lag, step - lag >= first)
        return carry

    carry = lax.fori_loop(0, count, body, init)
    if lag:
        plgpu.wgmma_wait(0)
        if not isinstance(end, int):  # else this stretch is the last one
            refill_after(first + count - 1, count > 0)
    return carry


def count_up(count: int, several: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carry = body(index, carry) for each index below `count`, several in one round of the loop.

    The loads of one round overlap.
    """

    def some(index, carry):
        for ahead in range(several):
            carry = body(index * several + ahead, carry)
        return carry

    carry = lax.fori_loop(0, count // several, some, carry)
    for rest in range(count // several * several, count):
        carry = body(rest, carry)
    return carry


def store_row(smem: Any, smem_row, gmem: Any, gmem_row) -> None:
    """Starts to copy a row of shared memory to a row of global memory.

    What lanes have stored in `smem` must be committed; plgpu.wait_smem_to_gmem waits for the end.
    """
    plgpu.copy_smem_to_gmem(smem.at[pl.ds(smem_row, 1)], gmem.at[pl.ds(gmem_row, 1)])


# 64 elements, in each warp the same.
_ANY_MULTIPLE_OF_64 = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,),
    vector_dim=-1,
)


def row_layout(length: int) -> Any:
    """A row of a multiple of 64 bf16 in registers: 16-byte loads where the length allows.

    It sets the order of a sum over the row.
    """
    for elements_a_lane in (8, 4, 2):
        if length % (128 * elements_a_lane) == 0:
            return plgpu.Layout.WG_STRIDED((length,), elements_a_lane)
    return _ANY_MULTIPLE_OF_64


def core_count() -> int:
    """Cores (SMs) of the GPU that is compiled for; an H100's where none can be asked."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        return device.core_count
    described = jax.sharding.get_abstract_mesh().abstract_device
    return (described and described.num_cores) or _H100_CORES


_H100_CORES = 132


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


def expect_capability(what: str, capabilities: Sequence[int], others: Mapping[str, Sequence[int]]):
    """Raises a NotImplementedError if the GPU that is compiled for is known to lack instructions.

    Args:
      what: whose kernel, for the message.
      capabilities: the major compute capabilities that it compiles for.
      others: what may be taken instead, by name, and their capabilities.
    """
    kind = device_kind()
    found = capability_of(kind)
    if found is None or found in capabilities:
        return
    accepted = " or ".join(f"{capability}.x" for capability in capabilities)
    able = [name for name, theirs in others.items() if found in theirs]
    raise NotImplementedError(
        f"{what} is for GPUs of compute capability {accepted}; {kind} has {found}.x, where "
        f"{' or '.join(able) or 'nothing else'} runs"
    )
