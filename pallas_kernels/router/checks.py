"""Named errors for what route_tokens cannot take: the field, its value and what is accepted."""

import jax.numpy as jnp

from pallas_kernels.mosaic.device import SHARED_MEMORY_BYTES
from pallas_kernels.mosaic.operands import expect_array
from pallas_kernels.router.work import Work

MOST_TOKENS = 128
MOST_EXPERTS = 512
MOST_CHOSEN = 32


def check_inputs(x, gate, K, norm_weight, norm_eps) -> None:
    """Raises ValueError, TypeError or NotImplementedError where an input is not accepted."""
    instead = "reference_route_tokens"
    expect_array("x", x, "[T, H]", jnp.bfloat16, instead=instead)
    expect_array("gate", gate, "[E, H]", jnp.bfloat16, instead=instead)
    (T, H), E = x.shape, gate.shape[0]
    if gate.shape[1] != H:
        raise ValueError(f"gate has shape {gate.shape}; expected [E, H] with H = {H} as in x")
    if norm_weight is not None:
        expect_array("norm_weight", norm_weight, "[H]", jnp.bfloat16, instead=instead)
        if norm_weight.shape != (H,):
            raise ValueError(f"norm_weight has shape {norm_weight.shape}; expected [H] = {(H,)}")
        if not norm_eps >= 0:
            raise ValueError(f"norm_eps is {norm_eps}; expected a number that is not negative")
    if T > MOST_TOKENS:
        raise NotImplementedError(
            f"T is {T}; the kernel takes 1 to {MOST_TOKENS} tokens, {instead} any number"
        )
    if E % 8 or E > MOST_EXPERTS:
        raise NotImplementedError(
            f"E is {E}; the kernel takes multiples of 8 up to {MOST_EXPERTS}, {instead} any number"
        )
    if H % 64:
        raise ValueError(f"H is {H}; expected a multiple of 64")
    if not isinstance(K, int) or not 1 <= K <= min(E, MOST_CHOSEN):
        raise ValueError(
            f"K is {K!r}; expected 1 to {min(E, MOST_CHOSEN)}, that is at most E = {E} and at most "
            f"{MOST_CHOSEN}"
        )


def check_work(work: Work) -> None:
    """Raises a NotImplementedError if a program's operands exceed its shared memory."""
    # What the other phases need, at most.
    most = SHARED_MEMORY_BYTES - 24 * 1024
    if work.slots * work.slot_bytes > most:
        raise NotImplementedError(
            f"H = {work.H}, E = {work.E} and T = {work.T} take {work.slots * work.slot_bytes} "
            f"bytes of shared memory on {work.num_programs} cores; the kernel has room for {most}: "
            "fewer tokens at a time, or reference_route_tokens"
        )
