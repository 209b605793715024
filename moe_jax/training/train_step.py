"""train_step: the gradient of the global batch's loss, and one update of the parameters.

Read `train_step`, then `gradients_of`. With several micro-batches there are two passes, because the
balance loss needs to know how often the whole batch chose each expert before any gradient:

    counts       forward passes of all micro-batches; left out if nothing needs them
    gradients    forward and backward passes, the loss's parts and their gradients added up
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.parallelism import Parallelism
from moe_jax.quantization import SCALES, VALUES
from moe_jax.routing_stats import entropy_of, imbalance_of
from moe_jax.training.batches import Batch
from moe_jax.training.objective import (
    MicroSums,
    Totals,
    TrainOptions,
    count_targets,
    losses_of,
    micro_sums,
    targets_of,
)
from moe_jax.training.optimizer import OptimizerOptions, learning_rate_at, make_optimizer

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes. There is no key, because a step draws nothing.

    Attributes:
      params: float32, by the names of moe_jax.parameters.
      optimizer_state: optax's.
      step: int32 scalar, steps done, which is the number of the next batch too.
    """

    params: Params
    optimizer_state: Any
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMetrics:
    """What a step found, before its update.

    Attributes:
      loss: float32 scalar: cross_entropy plus the router losses times their coefficients.
      cross_entropy: float32 scalar, the mean over targets, in nats; 0 without any.
      aux_loss, z_loss: float32 scalars, without their coefficients; 0 without MoE layers.
      gradient_norm: float32 scalar, of all gradients together, before clipping.
      learning_rate: float32 scalar.
      targets: int32 scalar, tokens that were predicted.
      tokens: int32 scalar, tokens that are not padding.
      load: [MoE layers, E] int32, how many tokens chose each expert.
      imbalance: [MoE layers] float32, the largest load over the mean load.
      load_entropy: [MoE layers] float32, of the shares of the load, in nats.
      router_entropy: [MoE layers] float32, the mean entropy of a token's probabilities, in nats.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    aux_loss: jax.Array
    z_loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    targets: jax.Array
    tokens: jax.Array
    load: jax.Array
    imbalance: jax.Array
    load_entropy: jax.Array
    router_entropy: jax.Array


def init_state(
    params: Params, optimizer: OptimizerOptions, *, parallelism: Parallelism | None = None
) -> TrainState:
    """The state before the first step.

    Args:
      params: as moe_jax.parameters.to_arrays gives them, of any floating dtype; float32 copies are
        trained.
      optimizer: the optimiser's options.
      parallelism: the mesh that the state is put on, as Parallelism.shardings_of says; None for the
        device that each parameter is on.

    Raises:
      ValueError: a parameter is quantised, or the mesh does not divide it.
    """
    quantised = sorted(name for name in params if name.endswith((VALUES, SCALES)))
    if quantised:
        raise ValueError(
            f"params has {quantised[0]}, which is FP8; expected plain parameters, as a load with "
            "dequantize=True gives them"
        )

    def make(params: Params) -> TrainState:
        # A copy, because a caller may donate the state and keep its model.
        params = {name: jnp.array(array, jnp.float32, copy=True) for name, array in params.items()}
        return TrainState(
            params=params,
            optimizer_state=make_optimizer(optimizer).init(params),
            step=jnp.zeros((), jnp.int32),
        )

    if parallelism is None:
        return make(params)
    placed = parallelism.place(params)
    shardings = parallelism.shardings_of(jax.eval_shape(make, placed))
    return jax.jit(make, out_shardings=shardings)(placed)


def train_step(
    state: TrainState, batch: Batch, *, options: TrainOptions
) -> tuple[TrainState, TrainMetrics]:
    """One step of AdamW on the loss of the whole batch, as moe_jax.training.objective defines it.

    Pure: to be compiled with `options` static. Under jit over sharded arrays the batch is that of
    all devices. A batch without targets has gradients of the router losses alone.

    Args:
      state: parameters, the optimiser's state and the step's number.
      batch: arrays [A, B, S], each micro-batch one after the other, and what its replay holds.
      options: how to compute it.

    Returns:
      The state after the step, and what was found at the parameters before it.

    Raises:
      ValueError: the batch is not of the shape [A, B, S], or its replay does not fit.
    """
    gradients, found = gradients_of(state.params, batch, options)
    with jax.named_scope("update"):
        updates, optimizer_state = make_optimizer(options.optimizer).update(
            gradients, state.optimizer_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradients)
    metrics = TrainMetrics(
        **found,
        gradient_norm=gradient_norm,
        learning_rate=learning_rate_at(options.optimizer, state.step),
    )
    state = TrainState(params=params, optimizer_state=optimizer_state, step=state.step + 1)
    if options.parallelism is None:
        return state, metrics
    shardings = options.parallelism.shardings_of(state)
    whole = options.parallelism.sharding()  # what every process can read
    return jax.lax.with_sharding_constraint((state, metrics), (shardings, whole))


def gradients_of(
    params: Params, batch: Batch, options: TrainOptions
) -> tuple[Params, dict[str, jax.Array]]:
    """The float32 gradients of the batch's loss, and the TrainMetrics that need no optimiser.

    Raises:
      ValueError: the batch is not of the shape [A, B, S], its replay does not fit, or the mesh does
        not divide the batch or the config.
    """
    _check(batch, options)
    if options.parallelism is not None:
        options.parallelism.check(options.config)
    A = batch.input_ids.shape[0]
    targets = targets_of(batch)
    counts = {
        "targets": count_targets(targets),
        "tokens": jnp.sum(batch.segment_ids >= 0, dtype=jnp.int32),
    }
    divisors = [jnp.maximum(count, 1).astype(jnp.float32) for count in counts.values()]

    def part(params: Params, micro: tuple, load: jax.Array | None) -> tuple[jax.Array, MicroSums]:
        """A micro-batch's addend to the loss; its own load where that is the whole batch's."""
        sums = micro_sums(params, *micro, options)
        if load is None and sums.router is not None:
            load = sums.router.load
        return losses_of(sums, Totals(*divisors, load), options)[0], sums

    def differentiate(params: Params, micro: tuple, load: jax.Array | None):
        gradients, sums = jax.grad(part, has_aux=True)(params, micro, load)
        if options.parallelism is not None:  # each device keeps its own part of the sum
            shardings = options.parallelism.shardings_of(gradients)
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        return gradients, sums

    if A == 1:
        gradients, sums = differentiate(
            params, jax.tree.map(lambda a: a[0], (batch, targets)), None
        )
    else:
        load = None
        if options.config.router_aux_loss_coef and options.config.moe_layers:
            with jax.named_scope("counts"):
                load = _sum_of(
                    lambda micro: micro_sums(params, *micro, options).router.load, (batch, targets)
                )
        with jax.named_scope("gradients"):
            gradients, sums = _sum_of(
                lambda micro: differentiate(params, micro, load), (batch, targets)
            )
    totals = Totals(*divisors, None if sums.router is None else sums.router.load)
    loss, terms = losses_of(sums, totals, options)
    return gradients, {"loss": loss, **terms, **counts, **_router_metrics(sums, totals, options)}


def _sum_of(function, micros):
    """The sum of function(micro) over the first dimension of arrays, one after the other."""
    first = jax.eval_shape(function, jax.tree.map(lambda a: a[0], micros))
    zeros = jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), first)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, function(micro)), None

    return jax.lax.scan(add, zeros, micros)[0]


def _router_metrics(sums: MicroSums, totals: Totals, options: TrainOptions) -> dict[str, jax.Array]:
    if sums.router is None:
        none = jnp.zeros(0, jnp.float32)
        load = jnp.zeros((0, options.config.num_experts), jnp.int32)
        return {"load": load, "imbalance": none, "load_entropy": none, "router_entropy": none}
    load = sums.router.load
    assigned = jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    return {
        "load": load,
        "imbalance": imbalance_of(load),
        "load_entropy": entropy_of(load / assigned),
        "router_entropy": sums.router.entropy / totals.tokens,
    }


def _check(batch: Batch, options: TrainOptions) -> None:
    shape = tuple(batch.input_ids.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"batch.input_ids has shape {shape}; expected [A, B, S], none of them 0")
    for name in ("labels", "segment_ids"):
        found = tuple(getattr(batch, name).shape)
        if found != shape:
            raise ValueError(
                f"batch.{name} has shape {found}; expected {shape}, as batch.input_ids has"
            )
    if batch.replay is not None:
        A, B, S = shape
        config = options.config
        expected = (A, len(config.moe_layers), B * S, config.num_experts_per_tok)
        for name in ("expert_ids", "expert_weights"):
            array = getattr(batch.replay, name)
            if array is not None and tuple(array.shape) != expected:
                raise ValueError(
                    f"batch.replay.{name} has shape {tuple(array.shape)}; expected [A, MoE layers, "
                    f"B*S, K] = {expected}"
                )
