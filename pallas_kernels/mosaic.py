"""The few version-touchy corners of Mosaic GPU that the kernels share."""

from collections.abc import Callable
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
    wgmmas_in_flight: int = 0,
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
      wgmmas_in_flight: how many of one step's wgmmas may still run when the next step begins. A
        wgmma is asynchronous and does not wait for earlier ones, so without this wait a slot would
        be refilled under the tensor core's eyes; no simulator here sees that race.

    Returns:
      The last carry.
    """
    refill_lag = 1 if wgmmas_in_flight else 0

    def start(step):
        slot = lax.rem(step, jnp.int32(num_slots))
        if active is None:
            copy(step, slot, barrier.at[slot])
        else:
            pl.when(active(step))(lambda: copy(step, slot, barrier.at[slot]))

    def wait_and_consume(step, carry):
        slot = lax.rem(step, jnp.int32(num_slots))
        plgpu.barrier_wait(barrier.at[slot])
        return consume(step, slot, carry)

    for step in range(min(num_slots, num_steps)):
        start(jnp.int32(step))

    def body(step, carry):
        if active is None:
            carry = wait_and_consume(step, carry)
        else:
            carry = lax.cond(active(step), wait_and_consume, lambda _, carry: carry, step, carry)
        if wgmmas_in_flight:
            plgpu.wgmma_wait(wgmmas_in_flight)
        refill = step - refill_lag + num_slots

        @pl.when((step >= refill_lag) & (refill < num_steps))
        def _():
            if not wgmmas_in_flight:
                plgpu.commit_smem()  # every lane's loads come before the copy engine's writes
            start(refill)

        return carry

    return lax.fori_loop(0, num_steps, body, init)
