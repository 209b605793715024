"""decode_layer: one new token of each row through a whole decoder layer, in few launches."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_scaled_fp8 import Weight
from pallas_kernels.decode_experts import ExpertWeights, decode_experts
from pallas_kernels.decode_experts.expert_major_config import tall_config
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles
from pallas_kernels.decode_step.input_checks import INSTEAD, check_config, check_inputs
from pallas_kernels.decode_step.layer import (
    LayerConfig,
    LayerShapes,
    attention_tasks,
    default_config,
    experts_tasks,
    router_tasks,
)
from pallas_kernels.decode_step.tasks import Task, mailbox_shapes, run_as_grid
from pallas_kernels.mosaic import device
from pallas_kernels.mosaic.mailbox import fresh_mailboxes


class LayerWeights(NamedTuple):
    """A layer's weights, [out, in]: bfloat16, or BlockScaledFp8 in blocks of 128 x 128.

    The norms and the gate are bfloat16. Of q_proj, k_proj and v_proj all three are FP8 or none,
    and of gate_up and down both or none; H, and with FP8 experts I, are then multiples of 128.

    Attributes:
      input_layernorm, post_attention_layernorm: [H].
      q_proj: [heads * D, H].
      k_proj, v_proj: [kv * D, H].
      q_norm, k_norm: [D].
      o_proj: [H, heads * D].
      gate: [E, H], the router's.
      gate_up, down: [E, 2, I, H] and [E, H, I].
    """

    input_layernorm: jax.Array
    q_proj: Weight
    k_proj: Weight
    v_proj: Weight
    q_norm: jax.Array
    k_norm: jax.Array
    o_proj: Weight
    post_attention_layernorm: jax.Array
    gate: jax.Array
    gate_up: Weight
    down: Weight


class Residual(NamedTuple):
    """The residual stream between two layers: x, and what the next layer adds to it.

    Attributes:
      x: [N, H] bfloat16, N = B rounded up to a multiple of 8; rows from B on may hold anything.
      parts: None, or [number, N, H] float32. Those of rows that are not valid do not count.
      mailboxes: what a layer hands to the next one for its tasks' use, see mosaic/mailbox.py. None
        makes fresh ones, by one more launch.
    """

    x: jax.Array
    parts: jax.Array | None = None
    mailboxes: dict[str, tuple[jax.Array, jax.Array]] | None = None

    @classmethod
    def of(cls, x: jax.Array) -> "Residual":
        """From x [B, H] alone."""
        return cls(jnp.pad(x, ((0, -len(x) % 8), (0, 0))))

    def total(self, valid: jax.Array) -> jax.Array:
        """[B, H]: the sum, rounded once; valid is [B]."""
        B = len(valid)
        if self.parts is None:
            return self.x[:B]
        total = self.x[:B].astype(jnp.float32)
        for part in self.parts[:, :B]:
            # Select, never multiply by zero: unwritten rows may hold inf or NaN.
            total += jnp.where(valid[:, None] > 0, part, 0)
        return total.astype(self.x.dtype)


class RowPositions(NamedTuple):
    """Where the new tokens stand.

    Attributes:
      cos, sin: [B, D] float32, RoPE's tables at the tokens' positions.
      lengths: [B] int32, tokens in each row of the cache before these.
      valid: [B] int32; a row with 0 appends nothing and is routed nowhere.
    """

    cos: jax.Array
    sin: jax.Array
    lengths: jax.Array
    valid: jax.Array


class LayerStep(NamedTuple):
    """What a layer returns.

    Attributes:
      residual: the Residual for the next layer.
      keys, values: [B, kv, C, D], the cache with the new tokens.
      ids: [B, K] int32, the experts of each row; -1 in a row that is not valid.
      weights: [B, K] float32, their weights.
      logits: [B, E] float32, the router's.
    """

    residual: Residual
    keys: jax.Array
    values: jax.Array
    ids: jax.Array
    weights: jax.Array
    logits: jax.Array


# How a layer is cut into grids; beyond 8 rows the experts are launches of their own.
LAUNCHES = ("layer", "blocks")


def decode_layer(
    residual: Residual,
    weights: LayerWeights,
    keys: jax.Array,
    values: jax.Array,
    positions: RowPositions,
    *,
    K: int,
    eps: float,
    norm_topk_prob: bool = True,
    launches: str = "layer",
    config: LayerConfig | None = None,
    interpret: Any = False,
) -> LayerStep:
    """Computes x + attention(norm(x)), then + experts(norm(x)), for one new token of each row.

    Accumulates in float32 from each product to the next operand of the tensor cores, which is
    bfloat16. A row's bits depend on its own tokens alone: not on its neighbours, nor up to 8 rows
    on how many there are.

    Args:
      residual: x with what is yet to be added; at most 64 rows.
      weights: the layer's.
      keys, values: [B, kv, C, D] bfloat16, the layer's cache, after RoPE; token p of a row is in
        slot p mod C, and C is a multiple of 64. They change in place if the caller donates them.
      positions: where the tokens stand.
      K: experts a token.
      eps: of all RMSNorms.
      norm_topk_prob: whether the K weights are divided by their sum.
      launches: "layer", one grid up to 8 rows; or "blocks", one for attention and the router's
        product, one for top-k and the experts.
      config: None takes default_config of B and of the experts' format.
      interpret: as in decode_experts.

    Raises:
      ValueError: a shape or a number does not fit; the message names it.
      TypeError: a dtype is not one that is accepted.
      NotImplementedError: a size that the kernels lack, or the GPU is not a Hopper.
    """
    step, _ = _checked_run(
        residual, weights, keys, values, positions, K, eps, norm_topk_prob, launches, config,
        interpret,
    )  # fmt: skip
    return step


def stamp_layer(
    residual: Residual,
    weights: LayerWeights,
    keys: jax.Array,
    values: jax.Array,
    positions: RowPositions,
    *,
    K: int,
    eps: float,
    norm_topk_prob: bool = True,
    launches: str = "layer",
    config: LayerConfig | None = None,
) -> tuple[LayerStep, dict[str, dict[str, jax.Array]]]:
    """decode_layer, and when each thread block of each task began, had waited and ended.

    Arguments as decode_layer's.

    Returns:
      What decode_layer returns, and for each grid and kind of task in it the [blocks, 4] int32 of
      mosaic.stamps.
    """
    return _checked_run(
        residual, weights, keys, values, positions, K, eps, norm_topk_prob, launches, config,
        stamped=True,
    )  # fmt: skip


def _checked_run(
    residual, weights, keys, values, positions, K, eps, norm_topk_prob, launches, config,
    interpret=False, stamped=False,
) -> tuple[LayerStep, dict[str, dict[str, jax.Array]]]:  # fmt: skip
    device.check_interpret(interpret)
    if launches not in LAUNCHES:
        raise ValueError(f"launches is {launches!r}; expected one of {list(LAUNCHES)}")
    shapes = check_inputs(residual, weights, keys, values, positions, K, eps, norm_topk_prob)
    quantised = "experts" in shapes.fp8
    config = default_config(shapes.B, quantised) if config is None else config
    check_config(config, quantised)
    device.expect_capability("decode_layer", (device.HOPPER,), {INSTEAD: device.ANY}, interpret)
    return _run(
        residual, weights, keys, values, positions, shapes=shapes, launches=launches,
        config=config, interpret=interpret, stamped=stamped,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("shapes", "launches", "config", "interpret", "stamped")
)
def _run(
    residual, weights, keys, values, positions,
    *, shapes: LayerShapes, launches: str, config: LayerConfig, interpret, stamped: bool,
) -> tuple[LayerStep, dict[str, dict[str, jax.Array]]]:  # fmt: skip
    s, stamps = shapes, {}
    known = {"x": residual.x, "keys": _rows(keys), "values": _rows(values)}
    known |= weights._asdict() | positions._asdict()
    experts = ExpertWeights(gate_up=weights.gate_up, down=weights.down)
    rows = experts.as_halves() if experts.quantised else experts.as_rows()
    known |= {"gate_up": rows.gate_up, "down": rows.down}
    if residual.parts is not None:
        known["parts"] = residual.parts
    num_parts = 0 if residual.parts is None else len(residual.parts)
    mailboxes = _mailboxes(s, config, launches, residual.mailboxes, interpret)
    for name, tasks in grids(s, config, num_parts, launches).items():
        given = {array: mailboxes[array] for array in mailbox_shapes(tasks)}
        found, stamps[name], turned = _launch(name, tasks, known, given, interpret, stamped)
        known, mailboxes = known | found, mailboxes | turned
    ids, chosen_weights = (known[name].reshape(s.B, s.K) for name in ("ids", "weights"))
    if "outputs" in known:
        outputs = known["outputs"].reshape(s.K, s.N, s.H)
    else:
        padding = ((0, s.N - s.B), (0, 0))
        outputs = decode_experts(
            known["moe_input"],
            experts,
            jnp.pad(ids, padding, constant_values=-1),
            jnp.pad(chosen_weights, padding),
            **_experts_options(s),
            out_dtype=jnp.float32,
            interpret=interpret,
        )[None]
    step = LayerStep(
        residual=Residual(known["residual"], outputs, mailboxes or None),
        keys=known["keys"].reshape(keys.shape),
        values=known["values"].reshape(values.shape),
        ids=ids,
        weights=chosen_weights,
        logits=known["logits"],
    )
    return step, stamps


def grids(
    s: LayerShapes, config: LayerConfig, num_parts: int, launches: str
) -> dict[str, list[Task]]:
    """The tasks of each grid, in their order. More than 8 rows leave the experts to others."""
    all_fit = WholeBatchTiles.fit(s.B, s.K)
    mailed = config.mailboxes and all_fit and launches == "layer"
    attention = attention_tasks(s, config, num_parts, num_parts > 0, mailed)
    router = router_tasks(s, mailed)
    if not all_fit:
        return {"decode_attention": [*attention, *router]}
    experts = experts_tasks(s, config, mailed)
    if launches == "layer":
        return {"decode_layer": [*attention, *router, *experts]}
    return {"decode_attention": attention, "decode_moe": [*router, *experts]}


def _launch(
    name: str, tasks: list[Task], known: dict, mailboxes: dict, interpret, stamped: bool
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict]:
    """The arrays that a grid's tasks write or change; stamps by kind, if asked for; mailboxes."""
    written = [name for task in tasks for name in task.writes.values()]
    changed = [name for task in tasks for name in task.updates.values()]
    made = {name for task in tasks for name in task.made.values()}
    read = {name for task in tasks for name in (*task.reads.values(), *changed)} - made
    kinds = {task.kind for task in tasks}
    given = {name: array for name, array in known.items() if name in read}
    tasks = [task.among(kinds) for task in tasks]
    found = run_as_grid(
        tasks, given, (*written, *changed), name=name, interpret=interpret, stamped=stamped,
        mailboxes=mailboxes,
    )  # fmt: skip
    stamps = {}
    if stamped:
        ends = np.cumsum([task.work.num_blocks for task in tasks])[:-1]
        parts = jnp.split(found.pop("stamps"), ends)
        stamps = dict(zip((task.kind for task in tasks), parts, strict=True))
    return found, stamps, found.pop("mailboxes", {})


def _mailboxes(
    s: LayerShapes, config: LayerConfig, launches: str, given: dict | None, interpret
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Those given, if they are of such a layer; else fresh ones.

    All that any layer needs: the first one has no parts to add, and uses fewer.
    """
    tasks = [task for grid in grids(s, config, s.K, launches).values() for task in grid]
    shapes = mailbox_shapes(tasks)
    if given is not None and {name: pair[0].shape for name, pair in given.items()} == shapes:
        return given
    return fresh_mailboxes(shapes, interpret) if shapes else {}


def _experts_options(s: LayerShapes) -> dict[str, Any]:
    """Of decode_experts, beyond 8 rows.

    The tables that it chooses by are of uniform routing. Rows of real text choose alike.
    """
    if s.B <= 32 or "experts" in s.fp8:
        return {}
    tall = tall_config(ExpertShapes(E=s.E, K=s.K, H=s.H, I=s.I))
    return {"layout": "expert_major", "config": tall} if tall else {}


def _rows(cache: jax.Array) -> jax.Array:
    return cache.reshape(-1, cache.shape[-1])
