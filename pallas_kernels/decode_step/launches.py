"""A layer as launches: grids of tasks, the experts' own kernels, sums over devices."""

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
from pallas_kernels.decode_step.grids import grids, shard_grids
from pallas_kernels.decode_step.layer import LayerConfig, LayerShapes
from pallas_kernels.decode_step.layer_arrays import (
    LayerShard,
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
)
from pallas_kernels.decode_step.tasks import Task, mailbox_shapes, run_as_grid
from pallas_kernels.mosaic.mailbox import fresh_mailboxes


def num_parts(s: LayerShapes, shard: LayerShard | None) -> int:
    """What a layer of these sizes leaves to be added: of each of K experts, or of all of them."""
    return s.K if shard is None and WholeBatchTiles.fit(s.B, s.K) else 1


def with_mailboxes(
    residual: Residual,
    weights: LayerWeights,
    shard: LayerShard | None,
    *,
    shapes: LayerShapes,
    launches: str,
    config: LayerConfig,
    interpret: Any,
) -> Residual:
    """The same with mailboxes for such a layer's grids: its own, if they fit, or fresh ones.

    Arguments as launch_layer's.
    """
    cut = _grids(shapes, config, launches, 1, weights, shard)
    wanted = mailbox_shapes([task for grid in cut.values() for task in grid])
    given = residual.mailboxes or {}
    if {name: pair[0].shape for name, pair in given.items()} == wanted:
        return residual
    return residual._replace(mailboxes=fresh_mailboxes(wanted, interpret) if wanted else None)


# Traced and lowered once for all layers of a call, which are alike.
@functools.partial(
    jax.jit, static_argnames=("shapes", "launches", "config", "interpret", "stamped")
)
def launch_layer(
    residual: Residual,
    weights: LayerWeights,
    cache: tuple[jax.Array, jax.Array],
    positions: RowPositions,
    shard: LayerShard | None,
    *,
    shapes: LayerShapes,
    launches: str,
    config: LayerConfig,
    interpret: Any,
    stamped: bool,
) -> tuple[LayerStep, dict[str, dict[str, jax.Array]]]:
    """One layer, of checked arguments.

    Args:
      residual: with parts, and with mailboxes as with_mailboxes gives them.
      weights, cache, positions: the layer's; see decode_layers.
      shard, launches, config, interpret: as in decode_layers.
      shapes: of the layer.
      stamped: whether stamps are wanted.

    Returns:
      The layer's step; each grid's stamps by kind of task, if wanted.
    """
    s, stamps, (keys, values) = shapes, {}, cache
    known = {"x": residual.x, "parts": residual.parts, "keys": _rows(keys), "values": _rows(values)}
    known |= weights._asdict() | positions._asdict()
    experts = ExpertWeights(gate_up=weights.gate_up, down=weights.down)
    rows = experts.as_halves() if experts.quantised else experts.as_rows()
    known |= {"gate_up": rows.gate_up, "down": rows.down}
    if shard is not None:
        known["first_expert"] = jnp.reshape(shard.first_expert, 1).astype(jnp.int32)
    mailboxes = residual.mailboxes or {}
    cut = _grids(s, config, launches, len(residual.parts), weights, shard)
    for name, tasks in cut.items():
        given = {array: mailboxes[array] for array in mailbox_shapes(tasks)}
        found, stamps[name], turned = _launch(name, tasks, known, given, interpret, stamped)
        known, mailboxes = known | found, mailboxes | turned
        if name == "decode_heads":
            known["o"] = lax.psum(jnp.sum(known["o"], axis=0, keepdims=True), shard.heads_over)
    ids, chosen = (known[name].reshape(s.B, s.K) for name in ("ids", "weights"))
    outputs = known["outputs"].reshape(s.K, s.N, s.H) if "outputs" in known else None
    if shard is not None or outputs is None:
        outputs = _outputs(s, experts, known["moe_input"], outputs, ids, chosen, shard, interpret)
    step = LayerStep(
        residual=Residual(known["residual"], outputs, mailboxes or None),
        keys=known["keys"].reshape(keys.shape),
        values=known["values"].reshape(values.shape),
        ids=ids,
        weights=chosen,
        logits=known["logits"],
    )
    return step, stamps


def _grids(
    s: LayerShapes, config: LayerConfig, launches: str, num_parts: int, weights, shard
) -> dict[str, list[Task]]:
    if shard is None:
        return grids(s, config, launches, num_parts)
    stored = weights.gate_up.shape[0]
    return shard_grids(s, config, launches, bool(shard.heads_over), stored, num_parts)


def _outputs(
    s: LayerShapes, experts: ExpertWeights, moe_input, outputs, ids, weights, shard, interpret
) -> jax.Array:
    """[1, N, H] float32: what a layer's experts add, where a grid has not all of that.

    Args:
      s: sizes.
      experts: the layer's, or the shard's.
      moe_input: [N, H], the experts' input.
      outputs: [K, N, H] of a shard's grid that has the experts; None of a grid that has not.
      ids, weights: [B, K].
      shard, interpret: as in decode_layers.
    """
    padding = ((0, s.N - s.B), (0, 0))
    if shard is not None:
        if outputs is None:
            outputs = _experts_of_shard(moe_input[: s.B], experts, ids, weights, shard, interpret)
        else:
            outputs = _sum_of_shard(outputs[:, : s.B], ids, shard, experts.gate_up.shape[0])
        return jnp.pad(lax.psum(outputs, shard.experts_over), padding)[None]
    return decode_experts(
        moe_input,
        experts,
        jnp.pad(ids, padding, constant_values=-1),
        jnp.pad(weights, padding),
        **_experts_options(s),
        out_dtype=jnp.float32,
        interpret=interpret,
    )[None]


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


def _experts_options(s: LayerShapes) -> dict[str, Any]:
    """Of decode_experts, beyond 8 rows.

    The tables that it chooses by are of uniform routing. A random model's rows share experts, which
    then have several tiles each, and tall tiles were faster (docs/lab.md).
    """
    if s.B <= 32 or "experts" in s.fp8:
        return {}
    tall = tall_config(ExpertShapes(E=s.E, K=s.K, H=s.H, I=s.I))
    return {"layout": "expert_major", "config": tall} if tall else {}


def _rows(cache: jax.Array) -> jax.Array:
    return cache.reshape(-1, cache.shape[-1])
