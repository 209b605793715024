"""route_tokens: from token activations to routed tokens in one kernel, and its checks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import device
from pallas_kernels.mosaic.operands import expect_array
from pallas_kernels.router.kernel import SplitLogits, launch_router
from pallas_kernels.router.reference import Route

_MAX_TOKENS = 128
_MAX_EXPERTS = 512
_MAX_CHOSEN = 32
_MAX_STAGE_BYTES = device.SHARED_MEMORY_BYTES - 24 * 1024  # which top-k needs, at most
_INSTEAD = "reference_route_tokens"


def route_tokens(
    x: jax.Array,
    gate: jax.Array,
    *,
    K: int,
    norm_topk_prob: bool = True,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-6,
    interpret: Any = False,
) -> Route:
    """Chooses K of E experts for each token: RMSNorm, logits, softmax and top-k.

    Logits are float32 sums of bf16 products; of two equal ones the lower index comes first. A
    token's results have the same bits in every batch. A token with a NaN has NaN weights, and some
    K different experts.

    Args:
      x: [T, H] bfloat16; T at most 128, H a multiple of 64.
      gate: [E, H] bfloat16; E a multiple of 8 up to 512.
      K: experts a token, at most E and at most 32.
      norm_topk_prob: whether the K weights are divided by their sum.
      norm_weight: [H] bfloat16, the weight of an RMSNorm of x that comes first; None for none. The
        variance is float32; the weight multiplies in bf16, after the cast back.
      norm_eps: of that norm.
      interpret: True runs the kernel in Pallas's interpret mode, on a CPU; an InterpretGPUParams
        does too, with its own options (see decode_experts).

    Returns:
      ids [T, K] int32, weights [T, K] float32, logits [T, E] float32, and normed
      [T, H] bfloat16 or None.

    Raises:
      ValueError: a shape, a size or a number does not fit; the message names it.
      TypeError: a dtype is not one that is accepted.
      NotImplementedError: more tokens or experts than the kernel takes, another float dtype, a
        gradient was asked for, or the GPU is not a Hopper; reference_route_tokens has them.
    """
    device.check_interpret(interpret)
    _check_inputs(x, gate, K, norm_weight, norm_eps)
    device.expect_capability("route_tokens", (device.HOPPER,), {_INSTEAD: device.ANY}, interpret)

    @jax.custom_jvp
    def forward(x, gate, norm_weight):
        return _run(
            x,
            gate,
            norm_weight,
            K=int(K),
            norm_topk_prob=bool(norm_topk_prob),
            norm_eps=0.0 if norm_weight is None else float(norm_eps),
            interpret=interpret,
        )

    @forward.defjvp
    def _(primals, tangents):
        raise NotImplementedError(f"route_tokens has no gradient; {_INSTEAD} has one")

    return forward(x, gate, norm_weight)


_run = jax.jit(launch_router, static_argnames=("K", "norm_topk_prob", "norm_eps", "interpret"))


def _check_inputs(x, gate, K, norm_weight, norm_eps) -> None:
    """Raises ValueError, TypeError or NotImplementedError where an input is not accepted."""
    expect_array("x", x, "[T, H]", jnp.bfloat16, instead=_INSTEAD)
    expect_array("gate", gate, "[E, H]", jnp.bfloat16, instead=_INSTEAD)
    (T, H), E = x.shape, gate.shape[0]
    if gate.shape[1] != H:
        raise ValueError(f"gate has shape {gate.shape}; expected [E, H] with H = {H} as in x")
    if norm_weight is not None:
        expect_array("norm_weight", norm_weight, "[H]", jnp.bfloat16, instead=_INSTEAD)
        if norm_weight.shape != (H,):
            raise ValueError(f"norm_weight has shape {norm_weight.shape}; expected [H] = {(H,)}")
        try:
            fits = float(norm_eps) >= 0
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"norm_eps is {norm_eps!r}; expected a number that is not negative")
    if T > _MAX_TOKENS:
        raise NotImplementedError(
            f"T is {T}; the kernel takes 1 to {_MAX_TOKENS} tokens, {_INSTEAD} any number"
        )
    if E % 8 or E > _MAX_EXPERTS:
        raise NotImplementedError(
            f"E is {E}; the kernel takes multiples of 8 up to {_MAX_EXPERTS}, {_INSTEAD} any number"
        )
    if H % 64:
        raise ValueError(f"H is {H}; expected a multiple of 64")
    most = min(E, _MAX_CHOSEN)
    if isinstance(K, bool) or not isinstance(K, (int, np.integer)) or not 1 <= K <= most:
        raise ValueError(
            f"K is {K!r}; expected 1 to {most}, that is at most E = {E} and at most {_MAX_CHOSEN}"
        )
    stage_bytes = SplitLogits(T=T, H=H, E=E).stage_bytes
    if stage_bytes > _MAX_STAGE_BYTES:
        raise NotImplementedError(
            f"H = {H} and T = {T} take {stage_bytes} bytes of shared memory; the kernel has room "
            f"for {_MAX_STAGE_BYTES}: fewer tokens at a time, or {_INSTEAD}"
        )
