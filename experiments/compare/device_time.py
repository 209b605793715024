"""Device time of a layer: the sum of its kernels' durations, gaps left out, by CUPTI.

It can exceed the time in a chain: there one kernel starts up while the one before it drains, and
here, launched singly and watched by the profiler, each pays for that alone.

The one place that touches JAX's experimental profiler. To be called after all chain timings: a
profiler that is attached slows launches down.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments.compare.routings import Routing
from experiments.compare.timing import chain_function, make_scratch
from pallas_kernels.decode_experts import ExpertWeights

# Inside a CUDA graph kernels are not reported one by one in every driver; launched singly they are.
_NO_CUDA_GRAPH = {"xla_gpu_enable_command_buffer": ""}


def device_us(
    layer: Callable,
    layers: Sequence[ExpertWeights],
    routings: Sequence[Routing],
    x: jax.Array,
) -> float:
    """Microseconds of kernels a step, over every routing once, each layer in turn.

    Raises whatever the profiler raises; RuntimeError if it saw no kernel.
    """
    from jax.experimental.mosaic.gpu import profiler

    layers = list(layers)
    steps = len(layers)
    routed = [(jnp.asarray(r.expert_ids), jnp.asarray(r.expert_weights)) for r in routings]
    groups = [routed[i : i + steps] for i in range(0, len(routed) - steps + 1, steps)]
    program = jax.jit(chain_function(layer, steps, steps), keep_unused=True)
    scratch = make_scratch(x, steps)
    compiled = program.lower(scratch, x, layers, groups[0]).compile(compiler_options=_NO_CUDA_GRAPH)
    measured = profiler.Cupti().measure(compiled)
    total_ms = 0.0
    for group in groups:
        _, kernels_ms = measured(scratch, x, layers, group)
        if kernels_ms is None:
            raise RuntimeError("CUPTI saw no kernel")
        total_ms += kernels_ms
    return total_ms * 1e3 / (steps * len(groups))
