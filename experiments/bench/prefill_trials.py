"""What prefill_speed times: a first token, forward and backward passes, the grouped products."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.prefill_records import expert_flop
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights, experts
from moe_jax.generation import stream
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays
from moe_jax.routing import route
from pallas_kernels.grouped_matmul import (
    GroupedMatmulConfig,
    gather_rows,
    gather_weights,
    group_assignments,
)
from pallas_kernels.grouped_matmul.gradient_to_weights import gradient_to_weights
from pallas_kernels.grouped_matmul.rows_by_weights import rows_by_weights, swiglu_by_weights

_AHEAD = 8  # calls that are issued back to back, so that they hide each other's launches


class Times(NamedTuple):
    """The median of some samples in ms, their range, and what the first call took beyond, in s."""

    ms: float
    ms_spread: float
    compile_s: float


def time_calls(call: Callable[[], Any], repeats: int, ahead: int = 1) -> Times:
    """Times call(), whose result is waited for after each `ahead` calls."""

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        results = [call() for _ in range(count)]
        jax.block_until_ready(results)
        return (time.perf_counter() - begun) / count

    first = seconds(1)
    samples = sorted(seconds(ahead) for _ in range(repeats))
    median = statistics.median(samples)
    return Times(median * 1e3, (samples[-1] - samples[0]) * 1e3, max(0.0, first - median))


def time_first_token(
    model: Qwen3Moe, batch: int, tokens: int, *, chunk: int, repeats: int, seed: int
) -> Times:
    """Times `stream` from its call to the first token of random prompts, as a user runs it."""
    prompts = _random_prompts(model, batch, tokens, seed)
    return time_calls(functools.partial(_generate_one, model, prompts, chunk), repeats)


def first_token(model: Qwen3Moe, batch: int, tokens: int, *, chunk: int, seed: int) -> None:
    """Generates one token for each of the prompts that time_first_token takes."""
    _generate_one(model, _random_prompts(model, batch, tokens, seed), chunk)


def _random_prompts(model: Qwen3Moe, batch: int, tokens: int, seed: int) -> list[list[int]]:
    drawn = np.random.default_rng([seed, batch, tokens])
    return drawn.integers(0, model.config.vocab_size, (batch, tokens)).tolist()


def _generate_one(model: Qwen3Moe, prompts: list[list[int]], chunk: int) -> None:
    for _ in stream(model, prompts, max_new_tokens=1, prefill_chunk=chunk):
        pass


def time_training(
    config: Qwen3MoeConfig, arrays: dict[str, jax.Array], tokens: int, *, repeats: int, seed: int
) -> Times:
    """Times loss and gradients of a model for one row, to all its parameters."""
    drawn = np.random.default_rng([seed, tokens])
    ids = jnp.asarray(drawn.integers(0, config.vocab_size, (1, tokens)), jnp.int32)

    @jax.jit
    def step(arrays):
        return jax.value_and_grad(lambda a: from_arrays(config, a)(ids, labels=ids).loss)(arrays)

    return time_calls(lambda: step(arrays), repeats)


class Layer(NamedTuple):
    """One layer's experts and a batch for them: x [T, H], ids and routing weights [T, K]."""

    x: jax.Array
    weights: ExpertWeights
    ids: jax.Array
    expert_weights: jax.Array


def make_layer(config: Qwen3MoeConfig, weights: ExpertWeights, tokens: int, *, seed: int) -> Layer:
    """A random batch, routed by random logits."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (tokens, weights.down.shape[1]), weights.down.dtype)
    logits = jax.random.normal(keys[1], (tokens, config.num_experts))
    routing = route(logits, config.num_experts_per_tok, norm_topk_prob=True)
    return Layer(x, weights, routing.ids, routing.weights)


def time_experts(layer: Layer, activation: str, repeats: int) -> Times:
    """Times one layer's experts, forward and backward, to x, weights and routing weights."""

    @jax.jit
    def step(x, weights, ids, expert_weights):
        def loss(x, weights, expert_weights):
            y = experts(x, weights, ids, expert_weights, activation=activation, phase="training")
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(x, weights, expert_weights)

    return time_calls(lambda: step(*layer), repeats, _AHEAD)


@dataclasses.dataclass(frozen=True)
class Product:
    """One product: a function of its operands, and the operations that its rows need."""

    name: str
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    flop: float


def products(config: Qwen3MoeConfig, layer: Layer) -> Iterator[Product]:
    """The grouped products that a layer's training takes, one after the other, and a dense one.

    Rows are the layer's own, sorted; cotangents are as random as they are.
    """
    settings = {"config": GroupedMatmulConfig(), "interpret": False}
    E, _, I, H = layer.weights.gate_up.shape
    assignments = jax.jit(group_assignments, static_argnums=1)(layer.ids, E)
    groups = assignments.groups
    rows = jax.jit(gather_rows)(layer.x, assignments)  # [R, H]
    row_weights = jax.jit(gather_weights)(layer.expert_weights, assignments)
    gate_up, down = layer.weights.gate_up, layer.weights.down
    wide, narrow = (jnp.tile(rows, (1, -(-columns // H)))[:, :columns] for columns in (2 * I, I))
    both = expert_flop(config, layer.x.shape[0]) * 2 / 3
    one = both / 2

    def swiglu(keep_projected):
        return lambda *operands: swiglu_by_weights(
            *operands, keep_projected=keep_projected, **settings
        )

    def by_weights(transposed):
        return lambda *operands: rows_by_weights(*operands, transposed=transposed, **settings)

    def to_weights(*operands):
        return gradient_to_weights(*operands, **settings)

    flat = gate_up.reshape(E, 2 * I, H)
    arguments = rows, gate_up, row_weights, groups
    yield Product("forward, gate and up", swiglu(False), arguments, both)
    yield Product("the same, both kept", swiglu(True), arguments, both)
    yield Product("forward, down", by_weights(False), (narrow, down, groups), one)
    yield Product("to rows, gate and up", by_weights(True), (wide, flat, groups), both)
    yield Product("to rows, down", by_weights(True), (rows, down, groups), one)
    yield Product("to weights, gate and up", to_weights, (wide, rows, groups), both)
    yield Product("to weights, down", to_weights, (rows, narrow, groups), one)
    assigned = layer.ids.size

    def dense(rows, weights):
        return jax.lax.dot_general(rows, weights, (((1,), (1,)), ((), ())))

    yield Product("one dense product, cuBLAS", dense, (rows[:assigned], flat[0]), both)


def time_product(product: Product, repeats: int) -> Times:
    """Times one of them."""
    run = jax.jit(product.run)
    return time_calls(lambda: run(*product.operands), repeats, _AHEAD)
