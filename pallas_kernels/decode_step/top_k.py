"""The router's last task: logits, softmax and top-k of one token in each thread block."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step.add_residual import inverse_rms, padded_experts, squares_piece
from pallas_kernels.mosaic.mailbox import Piece, collect, post
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.warpgroup import LANES, lane_indices, one_per_lane, scatter

_INT32_MIN = -(2**31)
# Few elements, in each warp the same.
_FEW = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """Block t: logits[t] = partials added in the order of splits, and the K likeliest experts.

    Reads partials [num_splits, N, padded_E] float32, of which columns beyond E may hold anything,
    squares as AddResidual has them, and valid [T] int32. Writes logits [T, E] float32, ids [T * K]
    int32 and weights [T * K] float32, a token's one after the other. A token that is not valid has
    ids of -1. Mailed, it posts ids and weights as float32, too; for a shard's experts it reads
    first_expert [1] int32, and posts ids less that number.

    Each lane has some experts, and counts those that come before its own: E comparisons, and no
    exchange between lanes. Beyond some 200 experts, K rounds of a maximum cost less. Then an expert
    whose rank is below K writes itself to that place.

    Shared memory is written and read by the same warpgroup alone, so Pallas's own barrier after
    each store is enough: commit_smem is for the copy engine and the tensor cores.

    Attributes:
      T, H, E, K: tokens, their size, experts, experts a token.
      eps: of the norm before the router.
      num_splits: of the product with the router's gate.
      norm_topk_prob: whether the K weights are divided by their sum.
      after: the kind of task that writes the partials.
      mailed: whether what it reads and posts is in mailboxes.
      sharded: whether what it posts is for the experts of a shard.
    """

    T: int
    H: int
    E: int
    K: int
    eps: float
    num_splits: int
    norm_topk_prob: bool
    after: str
    mailed: bool = False
    sharded: bool = False

    num_counters = 1
    bytes_read = 0

    @property
    def num_blocks(self) -> int:
        return self.T

    @property
    def arrivals(self) -> int:
        return self.T

    @property
    def padded_E(self) -> int:
        return padded_experts(self.E)

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        chosen = (self.T * self.K,)
        words = jax.ShapeDtypeStruct(chosen, jnp.float32)
        posted = {"id_words": words, "weight_words": words} if self.mailed else {}
        return posted | {
            "logits": jax.ShapeDtypeStruct((self.T, self.E), jnp.float32),
            "ids": jax.ShapeDtypeStruct(chosen, jnp.int32),
            "weights": words,
        }

    def shared_types(self) -> tuple:
        """One group, by names."""
        experts, ranks = (self.padded_E,), (round_up(self.K, LANES),)
        return (
            {
                "keys": plgpu.SMEM(experts, jnp.int32),
                "expert_logits": plgpu.SMEM(experts, jnp.float32),
                "chosen_ids": plgpu.SMEM(ranks, jnp.int32),
                "chosen_weights": plgpu.SMEM(ranks, jnp.float32),
            },
        )

    def barrier_types(self) -> Any:
        return ()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """All of token block_id."""
        del full
        (smem,), token = shared, block_id
        valid = arrays["valid"][token]
        wait(self.after)
        experts = one_per_lane(self.padded_E)
        pieces = [
            Piece(arrays["partials"].at[split, token], experts, limit=self.E)
            for split in range(self.num_splits)
        ]
        *partials, squares = collect([*pieces, squares_piece(arrays["squares"], token)])
        inverse = inverse_rms(squares, self.H, self.eps)
        expert_logits = self._add_partials(partials) * inverse  # [padded_E]
        ranks = self._rank(expert_logits, smem["keys"])
        smem["expert_logits"][...] = expert_logits
        self._choose(expert_logits, ranks, valid, smem)
        chosen = pl.ds(token * self.K, self.K)
        if self.mailed:  # first, because the experts' weights are loaded by them
            layout = one_per_lane(smem["chosen_ids"].shape[0])
            for role, name in (("id_words", "chosen_ids"), ("weight_words", "chosen_weights")):
                words = plgpu.load(smem[name], layout=layout)
                if self.sharded and role == "id_words":
                    words -= jnp.full_like(words, arrays["first_expert"][0])
                words = words.astype(jnp.float32)
                post(arrays[role].at[chosen], words, layout, limit=self.K)
        _store(smem["expert_logits"], arrays["logits"].at[token], self.E)
        _store(smem["chosen_ids"], arrays["ids"].at[chosen], self.K)
        _store(smem["chosen_weights"], arrays["weights"].at[chosen], self.K)
        signal()

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The same in plain jnp."""
        mean = jnp.sum(arrays["squares"], axis=0)[:, None] / self.H
        inverse = lax.rsqrt(mean + self.eps)  # [N, 1]
        logits = (jnp.sum(arrays["partials"], axis=0) * inverse)[: self.T, : self.E]
        weights, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), self.K)
        if self.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        ids = jnp.where(arrays["valid"][:, None] > 0, ids, -1).astype(jnp.int32)
        posted = ids - arrays["first_expert"][0] if self.sharded else ids
        return {
            "logits": logits,
            "ids": ids.reshape(-1),
            "id_words": posted.reshape(-1).astype(jnp.float32),
            "weights": weights.reshape(-1),
            "weight_words": weights.reshape(-1),
        }

    def _add_partials(self, partials) -> jax.Array:
        """[padded_E] float32: the logits, -inf where no expert is."""
        expert = lane_indices(self.padded_E)
        logits = jnp.zeros_like(expert, jnp.float32)
        for partial in partials:
            logits += partial
        return jnp.where(expert < self.E, logits, -jnp.inf)

    def _rank(self, logits: jax.Array, keys_smem) -> jax.Array:
        """[padded_E] int32: how many experts come before each one; a tie goes to the lower index.

        Floats are compared as integers of the same order, in which NaN is the largest and equal to
        itself. So the first K ranks belong to K experts, whatever the logits are.
        """
        bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # no -0.0
        keys = jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
        keys = jnp.where(logits != logits, 0x7FC00000, keys)
        expert = lane_indices(self.padded_E)
        keys = jnp.where(expert < self.E, keys, _INT32_MIN + 1)
        # Cycles of each, as guessed from the instructions.
        by_counting, by_rounds = 5 * self.E * (self.padded_E // LANES), 300 * self.K
        if by_counting <= by_rounds:
            return self._rank_by_counting(keys, expert, keys_smem)
        return self._rank_by_rounds(keys, expert)

    def _rank_by_counting(self, keys: jax.Array, expert: jax.Array, keys_smem) -> jax.Array:
        """Each lane compares its own experts with all E."""
        keys_smem[...] = keys
        one_less = keys - 1
        several = 16 if self.E % 16 == 0 else 8

        def count(index, ranks):
            start = index * several
            until_own = expert - start
            for ahead in range(several):
                # Against a lower index a tie is lost.
                bar = jnp.where(ahead < until_own, one_less, keys)
                ranks += jnp.where(keys_smem[start + ahead] > bar, 1, 0)
            return ranks

        return lax.fori_loop(0, self.E // several, count, jnp.zeros_like(keys))

    def _rank_by_rounds(self, keys: jax.Array, expert: jax.Array) -> jax.Array:
        """K times the largest key over all lanes; an expert that is not chosen ranks E."""

        def one_round(rank, carry):
            keys, ranks = carry
            # The lowest index by a maximum: the hardware has one over the lanes of a warp.
            is_next = expert == -jnp.max(jnp.where(keys == jnp.max(keys), -expert, _INT32_MIN))
            return jnp.where(is_next, _INT32_MIN, keys), jnp.where(is_next, rank, ranks)

        _, ranks = lax.fori_loop(0, self.K, one_round, (keys, jnp.full_like(keys, self.E)))
        return ranks

    def _choose(self, logits: jax.Array, ranks: jax.Array, valid, smem: dict[str, Any]) -> None:
        """Puts ids and weights in the order of ranks; each expert writes itself to its place."""
        expert = lane_indices(self.padded_E)
        exponentials = jnp.exp(logits - jnp.max(logits))
        if self.norm_topk_prob:
            total = jnp.sum(jnp.where(ranks < self.K, exponentials, 0.0))
        else:
            total = jnp.sum(exponentials)
        ids = jnp.where(jnp.full_like(expert, valid) > 0, expert, -1)
        scatter(ids, ranks, self.K, smem["chosen_ids"])
        scatter(exponentials / total, ranks, self.K, smem["chosen_weights"])


def _store(smem, gmem, count: int) -> None:
    """Copies the first `count` elements from shared to global memory."""
    if count % 8 == 0:
        layout = one_per_lane(count) if count % LANES == 0 else _FEW
        gmem[...] = plgpu.load(smem.at[pl.ds(0, count)], layout=layout, optimized=False)
    else:
        for index in range(count):
            gmem[index] = smem[index]
