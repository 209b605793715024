"""decode_layer: one new token of each row through a whole decoder layer, in few launches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from pallas_kernels.decode_step.layer_arrays import (
    LayerShard,
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
)
from pallas_kernels.decode_step.tasks import Task, mailbox_shapes, run_as_grid
from pallas_kernels.mosaic import device
from pallas_kernels.mosaic.mailbox import fresh_mailboxes

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
    shard: LayerShard | None = None,
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
      shard: the part of the layer that weights and caches hold; None for all of it. It is one grid
        where all of it would be, but the router's tasks are another where heads are split, and then
        the experts are launches of their own. The result is the whole layer's on each device, but
        for the caches.
      interpret: as in decode_experts.

    Raises:
      ValueError: a shape or a number does not fit; the message names it.
      TypeError: a dtype is not one that is accepted.
      NotImplementedError: a size that the kernels lack, or the GPU is not a Hopper.
    """
    step, _ = _checked_run(
        residual, weights, keys, values, positions, K, eps, norm_topk_prob, launches, config,
        shard, interpret,
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
        None, stamped=True,
    )  # fmt: skip


def _checked_run(
    residual, weights, keys, values, positions, K, eps, norm_topk_prob, launches, config,
    shard, interpret=False, stamped=False,
) -> tuple[LayerStep, dict[str, dict[str, jax.Array]]]:  # fmt: skip
    device.check_interpret(interpret)
    if launches not in LAUNCHES:
        raise ValueError(f"launches is {launches!r}; expected one of {list(LAUNCHES)}")
    shapes = check_inputs(
        residual, weights, keys, values, positions, K, eps, norm_topk_prob, shard is not None
    )
    quantised = "experts" in shapes.fp8
    config = default_config(shapes.B, quantised) if config is None else config
    check_config(config, quantised)
    device.expect_capability("decode_layer", (device.HOPPER,), {INSTEAD: device.ANY}, interpret)
    return _run(
        residual, weights, keys, values, positions, shard, shapes=shapes, launches=launches,
        config=config, interpret=interpret, stamped=stamped,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("shapes", "launches", "config", "interpret", "stamped")
)
def _run(
    residual, weights, keys, values, positions, shard,
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
    if shard is None:
        cut = functools.partial(grids, s, config, launches=launches)
    else:
        known["first_expert"] = jnp.reshape(shard.first_expert, 1).astype(jnp.int32)
        heads_split, stored = bool(shard.heads_over), weights.gate_up.shape[0]
        cut = functools.partial(shard_grids, s, config, launches, heads_split, stored)
    mailboxes = _mailboxes(cut(num_parts=s.K), residual.mailboxes, interpret)
    for name, tasks in cut(num_parts=num_parts).items():
        given = {array: mailboxes[array] for array in mailbox_shapes(tasks)}
        found, stamps[name], turned = _launch(name, tasks, known, given, interpret, stamped)
        known, mailboxes = known | found, mailboxes | turned
        if name == "decode_heads":
            known["o"] = lax.psum(jnp.sum(known["o"], axis=0, keepdims=True), shard.heads_over)
    ids, chosen_weights = (known[name].reshape(s.B, s.K) for name in ("ids", "weights"))
    outputs = known["outputs"].reshape(s.K, s.N, s.H) if "outputs" in known else None
    if shard is not None:
        if outputs is None:
            outputs = _experts_of_shard(
                known["moe_input"][: s.B], experts, ids, chosen_weights, shard, interpret
            )
        else:
            outputs = _sum_of_shard(outputs[:, : s.B], ids, shard, stored)
        outputs = lax.psum(outputs, shard.experts_over)
        outputs = jnp.pad(outputs, ((0, s.N - s.B), (0, 0)))[None]
    elif outputs is None:
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


def shard_grids(
    s: LayerShapes,
    config: LayerConfig,
    launches: str,
    heads_split: bool,
    stored: int,
    num_parts: int,
) -> dict[str, list[Task]]:
    """The same of a shard with `stored` experts; it may leave them to others with few rows, too.

    Where heads are split, o's products are added up between two grids.
    """
    one_grid = WholeBatchTiles.fit(s.B, s.K) and launches == "layer" and not heads_split
    mailed = config.mailboxes and one_grid
    *heads, add_2 = attention_tasks(s, config, num_parts, num_parts > 0, mailed)
    router = router_tasks(s, mailed, sharded=mailed)
    if mailed:
        experts = experts_tasks(s, config, mailed, stored)
        return {"decode_layer": [*heads, add_2, *router, *experts]}
    if not heads_split:
        return {"decode_attention": [*heads, add_2, *router]}
    add_2 = dataclasses.replace(add_2, work=dataclasses.replace(add_2.work, num_parts=1))
    return {"decode_heads": heads, "decode_router": [add_2, *router]}


def _experts_of_shard(tokens, experts, ids, weights, shard: LayerShard, interpret) -> jax.Array:
    """[B, H] float32: what a shard's experts add."""
    own = jnp.where(ids >= 0, ids - shard.first_expert, -1)
    return decode_experts(tokens, experts, own, weights, out_dtype=jnp.float32, interpret=interpret)


def _sum_of_shard(outputs: jax.Array, ids: jax.Array, shard: LayerShard, stored: int) -> jax.Array:
    """[B, H] float32 of outputs [K, B, H], in which rows of other shards' experts are unwritten."""
    own = (ids >= shard.first_expert) & (ids < shard.first_expert + stored)
    return jnp.sum(jnp.where(own.T[:, :, None], outputs, 0), axis=0)


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
    of_grids: dict[str, list[Task]], given: dict | None, interpret
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Those given, if they are of such a layer; else fresh ones.

    Args:
      of_grids: the tasks of a layer with parts to add; the first layer has none, and uses fewer.
      given: those that the layer before has handed on, or None.
      interpret: as in decode_layer.
    """
    tasks = [task for grid in of_grids.values() for task in grid]
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
