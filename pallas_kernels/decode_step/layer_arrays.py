"""What decode_layer takes and returns, as pytrees of arrays."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_fp8 import Weight


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShard:
    """What of a layer a device has, inside jax.shard_map; the shards' results are added up.

    Attributes:
      first_expert: int32 scalar. gate_up and down hold the experts from this one on, as many as
        they have; other ids of the router's E are padding. They may hold some of I, too.
      experts_over: names of the axes whose devices' experts are added up.
      heads_over: those over which query heads and kv heads are split; empty where each device has
        all of them.
    """

    first_expert: jax.Array
    experts_over: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    heads_over: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
