"""How long one layer's experts take with each backend, for many tokens: what decides prefill.

Calls are issued one after the other and the wait is for the last, so a call's launch hides behind
the call before; with few tokens what is seen is the launch. For decode steps there is
experiments.compare_layouts, which times chains whose weights come from memory.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights, experts
from moe_jax.routing import route

_CALLS = 10


class Timed(NamedTuple):
    """One backend at one T.

    Attributes:
      T: tokens.
      backend: its name.
      milliseconds: of a call; None if it cannot do this.
      temporaries_mb: what XLA allocates beside arguments and result.
      error: ||y - first|| / ||first||, against the first backend's result.
      lacks: why not, if it cannot.
    """

    T: int
    backend: str
    milliseconds: float | None = None
    temporaries_mb: float | None = None
    error: float | None = None
    lacks: str = ""


def measure(
    config: Qwen3MoeConfig,
    dtype,
    backends: Sequence[str],
    tokens: Sequence[int],
    seed: int,
    *,
    gradients: bool,
) -> Iterator[Timed]:
    """Times the experts of a random layer of this config on the default device.

    With gradients a call is of the phase "training" and returns those to x and to all weights, and
    `error` is of the gradient to x.
    """
    E, K = config.num_experts, config.num_experts_per_tok
    I, H = config.moe_intermediate_size, config.hidden_size
    keys = jax.random.split(jax.random.key(seed), 4)
    weights = ExpertWeights(
        gate_up=jax.random.normal(keys[0], (E, 2, I, H), dtype) * H**-0.5,
        down=jax.random.normal(keys[1], (E, H, I), dtype) * I**-0.5,
    )
    for T in tokens:
        x = jax.random.normal(keys[2], (T, H), dtype)
        routing = route(jax.random.normal(keys[3], (T, E)), K, norm_topk_prob=True)
        first = None
        for backend in backends:
            call = jax.jit(_call(config.hidden_act, backend, gradients))
            arguments = x, weights, routing.ids, routing.weights
            try:
                run = call.lower(*arguments).compile()
            except NotImplementedError as error:
                yield Timed(T, backend, lacks=str(error))
                continue
            y = run(*arguments)[0].astype(jnp.float32).block_until_ready()
            start = time.perf_counter()
            for _ in range(_CALLS):
                last = run(*arguments)
            jax.block_until_ready(last)
            seconds = (time.perf_counter() - start) / _CALLS
            first = y if first is None else first
            yield Timed(
                T,
                backend,
                seconds * 1e3,
                run.memory_analysis().temp_size_in_bytes / 1e6,
                float(jnp.linalg.norm(y - first) / jnp.linalg.norm(first)),
            )


def _call(activation: str, backend: str, gradients: bool):
    """(x, weights, ids, expert_weights) -> a tuple, the experts' output or the gradients."""
    phase = "training" if gradients else "prefill"
    run = functools.partial(experts, activation=activation, backend=backend, phase=phase)
    if not gradients:
        return lambda *arrays: (run(*arrays),)

    def loss(x, weights, ids, expert_weights):
        return jnp.sum(jnp.square(run(x, weights, ids, expert_weights).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 3))
