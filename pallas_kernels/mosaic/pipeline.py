"""Tiles streamed through a ring of shared-memory stages: the loop that every kernel here runs.

    prologue    load 0   load 1   load 2                         one load a stage
    mainloop    compute 0   load 3   compute 1   load 4   ...    step s lies in stage s % num_stages

A stage is refilled only when nothing can still read it: after this step's loads into registers, or,
with wgmmas in flight, one step later.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.warpgroup import sync_lanes

Load = Callable[[Any, Any], None]  # load(step, stage) starts the copies of a step


def pipeline(
    num_steps: int,
    num_stages: int,
    *,
    full: Any,
    load: Callable[[jax.Array, jax.Array, Any], None],
    compute: Callable[[jax.Array, jax.Array, Any], Any],
    init: Any,
    active: Callable[[jax.Array], jax.Array] | None = None,
    wgmmas_in_flight: int | None = None,
    between: Callable[[], None] | None = None,
) -> Any:
    """Runs prologue and mainloop over `num_steps` tiles, and waits for each stage to be full.

    Args:
      num_steps: tiles to stream.
      num_stages: stages of the ring; at least 2 with wgmmas in flight.
      full: a Barrier with num_barriers=num_stages, whose num_arrivals is the number of copies that
        one call of `load` starts.
      load: load(step, stage, barrier) starts the TMA copies of that step into that stage.
      compute: compute(step, stage, carry) -> carry.
      init: the first carry.
      active: active(step) says whether a step is loaded and computed at all; None means always.
      wgmmas_in_flight: how many of one step's wgmmas may still run when the next step begins; None
        if compute starts none. A wgmma is asynchronous and does not wait for earlier ones, so
        without this wait a stage would be refilled while the tensor cores read it. No simulator
        here sees that race.
      between: what to do after the prologue, while the first loads are on their way.

    Returns:
      The last carry.
    """

    def start(step, stage):
        if active is None:
            load(step, stage, full.at[stage])
        else:
            pl.when(active(step))(lambda: load(step, stage, full.at[stage]))

    def wait_and_compute(step, stage, carry):
        plgpu.barrier_wait(full.at[stage])
        return compute(step, stage, carry)

    def compute_if_active(step, stage, carry):
        if active is None:
            return wait_and_compute(step, stage, carry)
        return lax.cond(
            active(step), wait_and_compute, lambda _, __, carry: carry, step, stage, carry
        )

    prologue(num_steps, num_stages, start)
    if between is not None:
        between()
    return mainloop(
        num_steps,
        num_stages,
        load=start,
        compute=compute_if_active,
        init=init,
        wgmmas_in_flight=wgmmas_in_flight,
    )


def prologue(num_steps: int, num_stages: int, load: Load) -> None:
    """Starts the loads of the first steps, one for each stage."""
    for step in range(min(num_steps, num_stages)):
        load(jnp.int32(step), jnp.int32(step))


def mainloop(
    num_steps: int,
    num_stages: int,
    *,
    load: Load,
    compute: Callable[..., Any],
    init: Any,
    wgmmas_in_flight: int | None = None,
    take: Callable[[Any, Any], Any] | None = None,
    several: int = 1,
) -> Any:
    """Computes all steps of a ring whose prologue has run, and keeps it filled.

    Args:
      num_steps: tiles to stream.
      num_stages: stages of the ring; at least 2 with wgmmas in flight.
      load: load(step, stage) starts the copies of that step into that stage. With `take` all lanes
        have waited for each other before.
      compute: compute(step, stage, carry) -> carry waits until the stage is full, and uses it.
      init: the first carry.
      wgmmas_in_flight: as in pipeline. At the end nothing is in flight any more.
      take: take(step, stage) waits until the stage is full, and returns all that is needed of it, a
        list of lane_code.registers_type. Once all lanes have that, the stage is refilled, before
        compute(step, stage, carry, taken). What each lane stores in `take`, all may read there.
      several: steps that are taken together, before the first of them is computed, so that the
        waits of one fall into the work of another. It divides num_steps, is at most num_stages, and
        needs `take`.

    Returns:
      The last carry.

    Raises:
      ValueError: `several` is not as said.
    """
    if num_steps % several or several > (num_stages if take else 1):
        raise ValueError(
            f"several is {several} for {num_steps} steps; expected a divisor of at most "
            f"{num_stages}, the stages, and 1 without `take`"
        )
    lag = 1 if wgmmas_in_flight else 0

    def after(stage):
        # Where a ring has three stages or five, a remainder takes ten instructions that wait.
        return jnp.where(stage == num_stages - 1, 0, stage + 1)

    def refill(step, stage):
        @pl.when((step >= 0) & (step + num_stages < num_steps))
        def _():
            if wgmmas_in_flight is None and take is None:
                plgpu.commit_smem()  # every lane's loads come before the copy engine's writes
            load(step + num_stages, stage)

    def one_step(step, carries):
        stage, carry = carries
        carry = compute(step, stage, carry)
        if wgmmas_in_flight is not None:
            plgpu.wgmma_wait(wgmmas_in_flight)
        before = jnp.where(stage == 0, num_stages - 1, stage - 1) if lag else stage
        refill(step - lag, before)
        return after(stage), carry

    def taken_steps(index, carries):
        stage, carry = carries
        places = [(index * several, stage)]
        for ahead in range(1, several):
            places.append((index * several + ahead, after(places[-1][1])))
        taken = [take(*place) for place in places]
        sync_lanes([words for of_step in taken for words in of_step])
        for place in places:
            refill(*place)
        for place, of_step in zip(places, taken, strict=True):
            carry = compute(*place, carry, of_step)
        return after(places[-1][1]), carry

    body = one_step if take is None else taken_steps
    _, carry = lax.fori_loop(0, num_steps // several, body, (jnp.int32(0), init))
    if wgmmas_in_flight:
        plgpu.wgmma_wait(0)
    return carry


def unrolled(count: int, several: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
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
