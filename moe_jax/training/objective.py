"""The loss of a global batch, from sums over its micro-batches.

    loss = nll / targets  +  router_aux_loss_coef * balance  +  router_z_loss_coef * z / tokens
    balance = E * sum over e of (chosen_e / tokens) * (probability_e / tokens)

nll, chosen, probability and z are sums over all tokens; the latter three over all MoE layers too,
and `tokens` counts a token once for each layer. The balance loss is a product of two such sums, so
the mean of the micro-batches' own losses is another number. But `chosen` has no gradient. Once it
is known for the whole batch, the loss is linear in the other sums, and the gradients of the
micro-batches add up to that of the batch.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Qwen3MoeConfig
from moe_jax.layers import linear
from moe_jax.losses import IGNORED_LABEL, balance_of_sums, next_token_targets, summed_cross_entropy
from moe_jax.parallel_layers import head_of
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays
from moe_jax.routing import Routing
from moe_jax.routing_stats import entropy_of, expert_load
from moe_jax.training.batches import Batch
from moe_jax.training.optimizer import OptimizerOptions

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a step is computed. Nothing here is an array, so all of it is static under jit.

    Attributes:
      config: the model's, with router_aux_loss_coef and router_z_loss_coef.
      optimizer: the optimiser's.
      compute_dtype: "float32" or "bfloat16"; what the float32 parameters are rounded to for the
        step. A float32 router's gate is not rounded.
      balance: over what the balance loss is taken: "pooled" over all layers' tokens, as Hugging
        Face does, or "per_layer", the mean of each layer's own.
      remat: whether the backward pass computes each layer anew, so that of a layer only its input
        is kept.
      logit_columns: how many of a row's S positions have their logits in memory at once; None: all.
      experts_backend, attention_backend, platform: as in Qwen3Moe.__call__.
      parallelism: the mesh of the step, which splits a micro-batch's rows over data and expert, and
        parameters as its table says; None for one device. The losses stay those of all rows.

    Raises:
      ValueError: a name is none of those; logit_columns is below 1.
    """

    config: Qwen3MoeConfig
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    compute_dtype: str = "bfloat16"
    balance: Literal["pooled", "per_layer"] = "pooled"
    remat: bool = False
    logit_columns: int | None = None
    experts_backend: str = "auto"
    attention_backend: str = "auto"
    platform: str | None = None
    parallelism: Parallelism | None = None

    def __post_init__(self):
        accepted = {"compute_dtype": COMPUTE_DTYPES, "balance": ("pooled", "per_layer")}
        for name, names in accepted.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {names}")
        if self.logit_columns is not None and self.logit_columns < 1:
            raise ValueError(
                f"logit_columns is {self.logit_columns}; expected None or at least 1 position"
            )


class RouterSums(NamedTuple):
    """Sums over valid tokens, a row for each MoE layer; those of micro-batches may be added up.

    Attributes:
      load: [layers, E] int32, how many tokens chose each expert.
      probability: [layers, E] float32, of the tokens' probabilities.
      z: [layers] float32, of logsumexp(logits)^2.
      entropy: [layers] float32, of the entropies of the tokens' probabilities, in nats.
    """

    load: jax.Array
    probability: jax.Array
    z: jax.Array
    entropy: jax.Array


class MicroSums(NamedTuple):
    """Sums over a micro-batch: -log p of its targets, and what its routers did (None without)."""

    nll: jax.Array
    router: RouterSums | None


class Totals(NamedTuple):
    """What the loss of a part must know of the global batch; none of it has a gradient.

    Attributes:
      targets: float32, tokens to predict; at least 1, so that a batch without any has a loss of 0.
      tokens: float32, valid tokens; at least 1.
      load: [layers, E] int32, as in RouterSums; None without MoE layers.
    """

    targets: jax.Array
    tokens: jax.Array
    load: jax.Array | None


def targets_of(batch: Batch) -> jax.Array:
    """[..., B, S] int32: what each token is to predict, -100 for nothing."""
    S = batch.labels.shape[-1]
    flat = [array.reshape(-1, S) for array in (batch.labels, batch.segment_ids)]
    targets = next_token_targets(flat[0], valid=flat[1] >= 0, segments=flat[1])
    return targets.reshape(batch.labels.shape)


def count_targets(targets: jax.Array) -> jax.Array:
    """int32, how many of `targets_of` are to be predicted."""
    return jnp.sum(targets != IGNORED_LABEL, dtype=jnp.int32)


def micro_sums(
    params: dict[str, jax.Array], batch: Batch, targets: jax.Array, options: TrainOptions
) -> MicroSums:
    """Runs the model on one micro-batch.

    Args:
      params: float32, by the names of moe_jax.parameters.
      batch: arrays [B, S]; a replay's [MoE layers, B*S, K].
      targets: [B, S], as `targets_of` makes them.
      options: how to compute it.
    """
    with jax.named_scope("cast"):
        params = {name: cast_for_compute(name, array, options) for name, array in params.items()}
    valid = batch.segment_ids >= 0
    output = from_arrays(options.config, params)(
        batch.input_ids,
        attention_mask=valid,
        segment_ids=batch.segment_ids,
        logits_to_keep=1,  # none is used: the compiler leaves the model's own head out
        output_router_logits=False,
        output_routings=True,
        output_hidden_states=True,
        experts_backend=options.experts_backend,
        attention_backend=options.attention_backend,
        platform=options.platform,
        phase="training",
        remat=options.remat,
        parallelism=options.parallelism,
        replay=batch.replay,
    )
    tied = options.config.tie_word_embeddings
    head = head_of(params["embed_tokens.weight" if tied else "lm_head.weight"], options.parallelism)
    with jax.named_scope("cross_entropy"):
        nll = _head_nll(output.hidden_states[-1], head, targets, options.logit_columns)
    if not output.routings:
        return MicroSums(nll, None)
    sums = [_router_sums(routing, valid.reshape(-1)) for routing in output.routings]
    return MicroSums(nll, RouterSums(*map(jnp.stack, zip(*sums, strict=True))))


def cast_for_compute(name: str, array: jax.Array, options: TrainOptions) -> jax.Array:
    """A parameter as the step uses it."""
    in_float32 = name.endswith(".mlp.gate.weight") and options.config.router_dtype == "float32"
    return array if in_float32 else array.astype(options.compute_dtype)


def losses_of(
    sums: MicroSums, totals: Totals, options: TrainOptions
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a whole batch, or a part's addend to it.

    Returns:
      float32 scalar, and its terms without their coefficients: cross_entropy, aux_loss, z_loss.
    """
    zero = jnp.zeros((), jnp.float32)
    terms = {"cross_entropy": sums.nll / totals.targets, "aux_loss": zero, "z_loss": zero}
    if sums.router is not None:
        layers = sums.router.load.shape[0]
        load, probability = totals.load.astype(jnp.float32), sums.router.probability
        if options.balance == "pooled":
            load, probability = jnp.sum(load, axis=0), jnp.sum(probability, axis=0)
            terms["aux_loss"] = balance_of_sums(load, probability, layers * totals.tokens)
        else:
            tokens = jnp.broadcast_to(totals.tokens, (layers,))
            terms["aux_loss"] = jnp.mean(balance_of_sums(load, probability, tokens))
        terms["z_loss"] = jnp.sum(sums.router.z) / (layers * totals.tokens)
    config = options.config
    loss = (
        terms["cross_entropy"]
        + config.router_aux_loss_coef * terms["aux_loss"]
        + config.router_z_loss_coef * terms["z_loss"]
    )
    return loss, terms


def _router_sums(routing: Routing, valid: jax.Array) -> RouterSums:
    """A layer's row of RouterSums; valid is [T]."""
    E = routing.logits.shape[-1]
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))  # [T]
    entropies = entropy_of(jax.lax.stop_gradient(routing.probabilities))
    return RouterSums(
        load=expert_load(routing.ids, E),
        probability=jnp.sum(jnp.where(valid[:, None], routing.probabilities, 0), axis=0),
        z=jnp.sum(jnp.where(valid, squares, 0)),
        entropy=jnp.sum(jnp.where(valid, entropies, 0)),
    )


def _head_nll(x: jax.Array, head: jax.Array, targets: jax.Array, columns: int | None) -> jax.Array:
    """The sum of -log p(target) of normed x [B, S, H] with head [V, H]."""
    B, S, H = x.shape
    if columns is None or columns >= S:
        return summed_cross_entropy(linear(x, head), targets)
    fill = -S % columns
    x = jnp.pad(x, ((0, 0), (0, fill), (0, 0))).reshape(B, -1, columns, H)
    targets = jnp.pad(targets, ((0, 0), (0, fill)), constant_values=IGNORED_LABEL)
    targets = targets.reshape(B, -1, columns)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body has nothing to merge
    def add(total, part):
        return total + summed_cross_entropy(linear(part[0], head), part[1]), None

    parts = (x.swapaxes(0, 1), targets.swapaxes(0, 1))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]
