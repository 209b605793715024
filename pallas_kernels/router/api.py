"""route_tokens: from token activations to routed tokens in one kernel."""

import functools
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import device
from pallas_kernels.router import kernel
from pallas_kernels.router.checks import check_inputs, check_work
from pallas_kernels.router.reference import Route
from pallas_kernels.router.work import Work


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
    token's results have the same bits whatever T is and whoever its neighbours are. A token with a
    NaN has NaN weights, and some K different experts.

    Args:
      x: [T, H] bfloat16; T at most 128, H a multiple of 64.
      gate: [E, H] bfloat16; E a multiple of 8 up to 512.
      K: experts a token, at most E and at most 32.
      norm_topk_prob: whether the K weights are divided by their sum.
      norm_weight: [H] bfloat16, the weight of an RMSNorm of x that comes first; None for none. The
        variance is float32; the weight multiplies in bf16, after the cast back.
      norm_eps: of that norm.
      interpret: True runs the phases one by one in Pallas's interpret mode, on a CPU; an
        InterpretGPUParams does too, with its own options (see decode_experts).

    Returns:
      ids [T, K] int32, weights [T, K] float32, logits [T, E] float32, and normed
      [T, H] bfloat16 or None.

    Raises:
      ValueError: a shape, a size or a number does not fit; the message names it.
      TypeError: a dtype is not one that is accepted.
      NotImplementedError: more tokens or experts than the kernel takes, another float dtype, a
        gradient was asked for, or the GPU is not a Hopper; reference_route_tokens has them.
    """
    check_inputs(x, gate, K, norm_weight, norm_eps)
    if not isinstance(interpret, (bool, plgpu.InterpretGPUParams)):
        raise TypeError(f"interpret is {interpret!r}; expected a bool or an InterpretGPUParams")
    (T, H), E = x.shape, gate.shape[0]
    work = functools.partial(
        Work,
        T=T,
        H=H,
        E=E,
        K=K,
        norm_topk_prob=bool(norm_topk_prob),
        norm_eps=None if norm_weight is None else float(norm_eps),
    )
    programs = kernel.num_programs(work(num_programs=1).units, T, interpret)
    work = work(num_programs=programs)
    if not interpret:
        check_work(work)
        others = {"reference_route_tokens": device.ANY}
        device.expect_capability("route_tokens", (device.HOPPER,), others)
    return _without_gradient(work, interpret)(x, gate, norm_weight)


@functools.partial(jax.jit, static_argnames=("work", "interpret"))
def _run(x, gate, norm_weight, *, work: Work, interpret) -> Route:
    @jax.custom_batching.sequential_vmap  # a grid that fills the GPU cannot be batched
    def call(x, gate, norm_weight):
        results = kernel.run(work, x, gate, norm_weight, interpret)
        return Route(
            ids=results["ids"],
            weights=results["weights"],
            logits=results["logits"],
            normed=results.get("normed"),
        )

    return call(x, gate, norm_weight)


def _without_gradient(work: Work, interpret):
    """Turns a request for a derivative into an error that says what has one."""

    @jax.custom_jvp
    def forward(x, gate, norm_weight):
        return _run(x, gate, norm_weight, work=work, interpret=interpret)

    @forward.defjvp
    def _(primals, tangents):
        raise NotImplementedError("route_tokens has no gradient; reference_route_tokens has one")

    return forward
