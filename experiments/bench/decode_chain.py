"""Decode steps of a whole model as a chain that never waits for the host.

A chain is one compiled program: a lax.scan over several steps, each of them embedding, layers,
head and choice of the next token. The cache is donated and the tokens stay on the device.

A context of N tokens is not computed: the cache is filled with random keys and values of standard
deviation 1, which is what RMSNorm and random weights of deviation 0.02 give, and each row's length
is N. That takes the same bytes and the same kernels as N real tokens, and no prefill. Every run
begins at N again.

Rows of a random model that all choose greedily soon write the same tokens and share their experts,
which is less to read. So each row and step is given a random token of its own; the head and the
choice are computed all the same, and the next step waits for them. feed="sampled" takes the choice
instead, drawn at temperature 1.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.cache import KVCache, init_cache
from moe_jax.dispatch import record_choices
from moe_jax.generation import Sampling
from moe_jax.generation.logits_processors import NO_TOKEN
from moe_jax.generation.sampling import choose, row_keys
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import resolve_platform
from moe_jax.routing import Routing
from moe_jax.traces import trace_of

FEEDS = ("given", "sampled")
_CAPACITY_STEP = 64


def capacity_of(context: int, steps: int) -> int:
    """Tokens that a row of the cache holds: both together, in steps of 64."""
    return -(-(context + steps) // _CAPACITY_STEP) * _CAPACITY_STEP


def draw_tokens(V: int, B: int, steps: int, seed: int) -> np.ndarray:
    """[steps, B] int32 below V: random tokens, no two rows of a step with the same.

    Raises:
      ValueError: there are more rows than tokens.
    """
    if B > V:
        raise ValueError(f"batch is {B}; expected at most {V} rows, as the vocabulary has tokens")
    random = np.random.default_rng([seed, B])
    return np.stack([random.choice(V, B, replace=False) for _ in range(steps)]).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_array(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def draw_cache(
    model: Qwen3Moe,
    B: int,
    context: int,
    capacity: int,
    seed: int,
    parallelism: Parallelism | None = None,
) -> KVCache:
    """A cache of B rows that hold `context` random tokens each, drawn on a device."""
    dtype = model.embed_tokens.weight.dtype
    shapes = jax.eval_shape(lambda: init_cache(model.config, B, capacity, dtype))
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(shapes.keys)))
    sharding = None if parallelism is None else parallelism.cache_sharding(B)

    def draw(array) -> jax.Array:
        drawn = _random_array(next(keys), array.shape, array.dtype)
        return drawn if sharding is None else jax.device_put(drawn, sharding)

    arrays = [tuple(map(draw, layers)) for layers in (shapes.keys, shapes.values)]
    return KVCache(keys=arrays[0], values=arrays[1], lengths=jnp.full(B, context, jnp.int32))


class _Carried(NamedTuple):
    """What each run takes over from the one before, by donation.

    Attributes:
      keys, values: of the cache.
      chosen: [steps, B] int32, the tokens chosen.
      expert_ids: [steps, MoE layers, B, K] int32.
      logits: [B, V] of the last step, or None.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    chosen: jax.Array
    expert_ids: jax.Array
    logits: jax.Array | None


class DecodeChain:
    """Some decode steps of a model as one program; a Timeable of timing.py.

    Its runs return the experts that they chose, so that the limit is counted from the very steps
    timed. The ids are in memory for the experts anyway; one small kernel a step gathers them.
    """

    def __init__(
        self,
        model: Qwen3Moe,
        *,
        B: int,
        context: int,
        steps: int,
        feed: str = "given",
        seed: int = 0,
        experts_backend: str = "auto",
        attention_backend: str = "auto",
        platform: str | None = None,
        parallelism: Parallelism | None = None,
        keep_logits: bool = False,
    ):
        """Draws the cache and the tokens, and compiles the program.

        Args:
          model: its parameters are used in place.
          B, context: rows, and tokens that each holds before the first step.
          steps: of a run.
          feed: one of FEEDS.
          seed: of the cache, the tokens and the draws.
          experts_backend, attention_backend, platform: as in Qwen3Moe.__call__.
          parallelism: the mesh that the model's parameters lie on; None for one device.
          keep_logits: whether a run keeps the logits of its last step.

        Raises:
          ValueError, NotImplementedError: as the model's; there are more rows than tokens.
        """
        config = model.config
        self.steps, self.context = steps, context
        self.tokens = draw_tokens(config.vocab_size, B, steps, seed)
        cache = draw_cache(model, B, context, capacity_of(context, steps), seed, parallelism)
        K = config.num_experts_per_tok if config.moe_layers else 0
        routed = (steps, len(config.moe_layers), B, K)
        self._carried = _Carried(
            cache.keys,
            cache.values,
            jnp.zeros((steps, B), jnp.int32),
            jnp.zeros(routed, jnp.int32),
            jnp.zeros((B, config.vocab_size), cache.keys[0].dtype) if keep_logits else None,
        )
        rows = jnp.arange(B, dtype=jnp.uint32)
        seeds = jnp.full(B, seed, jnp.uint32)
        self._fixed = (
            to_arrays(model),
            cache.lengths,
            jnp.asarray(self.tokens),
            row_keys(seeds, rows),
        )
        program = _program(
            config,
            feed,
            experts_backend=experts_backend,
            attention_backend=attention_backend,
            platform=resolve_platform(platform),
            parallelism=parallelism,
        )
        shardings = None
        if parallelism is not None:
            whole = parallelism.sharding()
            keys, values, *others = self._carried
            self._carried = _Carried(keys, values, *jax.device_put(others, whole))
            self._fixed = (self._fixed[0], *jax.device_put(self._fixed[1:], whole))
            # As they came in, because a run takes over what the one before has left.
            shardings = jax.tree.map(lambda array: array.sharding, self._carried)
        jitted = jax.jit(program, donate_argnums=0, keep_unused=True, out_shardings=shardings)
        begun = time.perf_counter()
        with record_choices() as choices:
            lowered = jitted.lower(self._carried, *self._fixed)
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - begun
        self.backends = {request.op: choice.backend for request, choice in choices}

    @property
    def program_bytes(self) -> int | None:
        """The program's arguments, results and temporaries on the device."""
        found = self.compiled.memory_analysis()
        if found is None:
            return None
        sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        return int(sizes - found.alias_size_in_bytes)

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return self._carried.keys[0].dtype.itemsize

    def enqueue(self) -> None:
        """Issues one run of all steps without waiting for it."""
        self._carried = self.compiled(self._carried, *self._fixed)

    def wait(self) -> None:
        """Returns when everything issued has run."""
        jax.block_until_ready(self._carried)

    def expert_ids(self) -> np.ndarray:
        """[steps, MoE layers, B, K] int32 of the last run."""
        return np.asarray(self._carried.expert_ids)

    def logits(self) -> np.ndarray:
        """[B, V] float32 of the last run's last step, where it keeps them."""
        return np.asarray(self._carried.logits, np.float32)

    def chosen(self) -> np.ndarray:
        """[steps, B] int32: the tokens that the last run chose.

        Raises:
          FloatingPointError: a row's logits were NaN, after which it ran as padding.
        """
        tokens = np.asarray(self._carried.chosen)
        if np.any(tokens == NO_TOKEN):
            step, row = np.argwhere(tokens == NO_TOKEN)[0].tolist()
            raise FloatingPointError(f"step {step}, row {row}: the logits are NaN")
        return tokens


def _expert_ids(routings: Sequence[Routing], B: int) -> jax.Array:
    """[MoE layers, B, K] int32; K is 0 in a model without such layers."""
    return trace_of(routings).expert_ids if routings else jnp.zeros((0, B, 0), jnp.int32)


def _program(config, feed: str, *, platform: str, **how) -> Callable:
    """program(carried, parameters, lengths [B], tokens [steps, B], keys [B]) -> carried.

    `how` is the model's call's.
    """
    if feed not in FEEDS:
        raise ValueError(f"feed is {feed!r}; expected one of {', '.join(FEEDS)}")
    sampling = Sampling(temperature=0.0 if feed == "given" else 1.0)
    ops = platform_ops(platform)

    def program(carried: _Carried, parameters, lengths, tokens, keys) -> _Carried:
        model = from_arrays(config, parameters)
        B = lengths.shape[0]
        history = sampling.steps.empty_history(B, config.vocab_size, 0)
        values = sampling.values()

        def step(state, inputs):
            cache, last, _ = state
            index, given = inputs
            # `last` is never below NO_TOKEN, which XLA does not know: the step waits for it.
            ids = jnp.where(last >= NO_TOKEN, given, last) if feed == "given" else last
            output = model(
                ids[:, None],
                attention_mask=(last != NO_TOKEN)[:, None],  # as in generation
                cache=cache,
                logits_to_keep=1,
                output_router_logits=False,
                output_routings=True,
                platform=platform,
                **how,
            )
            with jax.named_scope("choose"):
                chosen = choose(
                    output.logits[:, -1], history, keys, index, sampling.steps, values, ops
                )
            kept = None if carried.logits is None else output.logits[:, -1]
            return (output.cache, chosen, kept), (chosen, _expert_ids(output.routings, B))

        cache = KVCache(keys=carried.keys, values=carried.values, lengths=lengths)
        numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        first = (cache, tokens[0], carried.logits)
        (cache, _, logits), ran = lax.scan(step, first, (numbers, tokens))
        return _Carried(cache.keys, cache.values, *ran, logits)

    return program
