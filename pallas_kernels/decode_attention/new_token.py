"""What a block of decode attention needs of the new token: queries, a key, a value, and scores."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.mailbox import Piece, collect
from pallas_kernels.mosaic.warpgroup import ROWS_BY_64, TILE_ROWS, one_per_lane

HEAD_SIZE = 128
ROWS = TILE_ROWS  # heads that are normed and turned at a time

_HALF = HEAD_SIZE // 2  # RoPE turns element i with element i + D/2
_TILE = ROWS_BY_64  # 8 heads by half their elements
_ELEMENTS = _TILE.reduce(0)


@dataclasses.dataclass(frozen=True)
class Constants:
    """What does not depend on the new token's activations, as halves of D elements.

    Attributes:
      cos, sin: of the row's position.
      q_norm, k_norm: the norms' weights.
    """

    cos: list[jax.Array]
    sin: list[jax.Array]
    q_norm: list[jax.Array]
    k_norm: list[jax.Array]

    @classmethod
    def load(cls, *refs) -> "Constants":
        """From cos, sin, q_norm and k_norm, [D] each in global memory."""
        return cls(*(_load_halves(ref, _ELEMENTS) for ref in refs))

    def turn(self, halves, weights) -> list[jax.Array]:
        """As RoFormer has it: (x1 cos - x2 sin, x2 cos + x1 sin), of normed halves [64] or [8, 64].

        Args:
          halves: of heads, divided by their root mean square.
          weights: of the norm, of the halves' shape.
        """
        first, second = (x * weight for x, weight in zip(halves, weights, strict=True))
        cos, sin = self.cos, self.sin
        if first.ndim == 2:
            cos, sin = map(_to_rows, cos), map(_to_rows, sin)
        (cos1, cos2), (sin1, sin2) = cos, sin
        return [_rounded(first * cos1 - second * sin1), _rounded(second * cos2 + first * sin2)]


def prepare(
    parts: Sequence[Any], squares: Piece | None, factor, kv_head, constants: Constants, q_smem,
    scores_smem, new_smem,
    *, heads: int, kv: int, eps: float, scale: float,
) -> None:  # fmt: skip
    """Puts the queries, the new key and value, and the scores of this key, in shared memory.

    All loads from global memory come first, because each takes as long as all.

    Args:
      parts: [heads + 2 kv, D] float32 each, in global memory: partial sums of the row's query
        heads, keys and values; refs or Mailboxes.
      squares: what is loaded with them, or None.
      factor: factor(squares) is float32, what the sums are multiplied with; 1 without squares.
      kv_head: int32.
      constants: of the row.
      q_smem: [N, D], see wgmma_operand; the G query heads of kv_head.
      scores_smem: [N] float32.
      new_smem: [2, D] float32.
      heads: in parts.
      kv: likewise.
      eps: of the norms.
      scale: of scores.
    """
    G, D = heads // kv, HEAD_SIZE
    starts = range(0, G, ROWS)
    key_row, value_row = heads + kv_head, heads + kv + kv_head
    asked = _Asked()
    asked_queries = [
        [asked.heads(part, kv_head * G + start, G - start, 2 * kv) for part in parts]
        for start in starts
    ]
    asked_keys = [asked.halves(part.at[key_row], _ELEMENTS) for part in parts]
    asked_values = [asked.array(part.at[value_row], one_per_lane(D)) for part in parts]
    if squares is not None:
        asked.pieces.append(squares)
    loaded = collect(asked.pieces)
    multiplier = jnp.float32(1) if squares is None else factor(loaded[-1])
    queries = [
        _add_halves([get(loaded) for get in partials], multiplier) for partials in asked_queries
    ]
    key = _add_halves([get(loaded) for get in asked_keys], multiplier)
    value = multiplier * functools.reduce(jnp.add, [get(loaded) for get in asked_values])
    square = jnp.sum(key[0] * key[0]) + jnp.sum(key[1] * key[1])
    key = constants.turn([x * lax.rsqrt(square / D + eps) for x in key], constants.k_norm)
    for start, query in zip(starts, queries, strict=True):
        squares = jnp.sum(query[0] * query[0], axis=1) + jnp.sum(query[1] * query[1], axis=1)
        inverse = lax.rsqrt(squares / D + eps)  # [8]
        inverse = lax.broadcast_in_dim(inverse, (ROWS, _HALF), (0,))
        query = constants.turn(
            [x * inverse for x in query], [_to_rows(w) for w in constants.q_norm]
        )
        rows, score = pl.ds(start, ROWS), 0.0
        for half in range(2):
            columns = pl.ds(half * _HALF, _HALF)
            q_smem[rows, columns] = query[half].astype(jnp.bfloat16)
            score += jnp.sum(query[half] * _to_rows(key[half]), axis=1)
        scores_smem[rows] = score * scale
    for half in range(2):
        new_smem[0, pl.ds(half * _HALF, _HALF)] = key[half]
    new_smem[1] = _rounded(value)
    plgpu.commit_smem()


def _rounded(x: jax.Array) -> jax.Array:
    """Float32 with the values of bf16, which is what the tensor cores and the cache get."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _to_rows(vector: jax.Array) -> jax.Array:
    """[64] -> [8, 64]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (ROWS, _HALF), (1,)), _TILE)


def _load_halves(ref, layout) -> list[jax.Array]:
    """The two halves of [..., D], float32."""
    loaded = [plgpu.load(half, layout=layout, optimized=False) for half in _halves(ref)]
    return [half.astype(jnp.float32) for half in loaded]


def _halves(ref) -> list[Any]:
    others = [slice(None)] * (len(ref.shape) - 1)
    return [ref.at[(*others, pl.ds(half * _HALF, _HALF))] for half in range(2)]


class _Asked:
    """Pieces that one `collect` is asked for; each method returns what gets its own from them."""

    def __init__(self):
        self.pieces: list[Piece] = []

    def array(self, ref, layout, limit=None) -> Callable[[list], jax.Array]:
        index = len(self.pieces)
        self.pieces.append(Piece(ref, layout, limit=limit))
        return lambda loaded: loaded[index]

    def halves(self, ref, layout, limit=None) -> Callable[[list], list[jax.Array]]:
        """Of [..., D]."""
        getters = [self.array(part, layout, limit) for part in _halves(ref)]
        return lambda loaded: [get(loaded) for get in getters]

    def heads(self, part, first, count: int, rows_behind: int) -> Callable[[list], list[jax.Array]]:
        """Both halves [8, 64] of some heads; behind `count` of them, if these are fewer, zeros.

        Args:
          part: [heads + 2 kv, D].
          first: of the heads, traced.
          count: how many there are; 8 of them are loaded at most.
          rows_behind: of part, that follow the heads, however late the first one is.
        """
        if count + rows_behind >= ROWS:
            return self.halves(part.at[pl.ds(first, ROWS)], _TILE, limit=min(count, ROWS))
        getters = [self.halves(part.at[first + head], _ELEMENTS) for head in range(count)]

        def stack(loaded) -> list[jax.Array]:
            place = plgpu.broadcasted_iota(jnp.int32, (ROWS, _HALF), 0, layout=_TILE)
            tiles = [plgpu.layout_cast(jnp.zeros((ROWS, _HALF), jnp.float32), _TILE)] * 2
            for head, get in enumerate(getters):
                tiles = [
                    jnp.where(place == head, _to_rows(half), tile)
                    for half, tile in zip(get(loaded), tiles, strict=True)
                ]
            return tiles

        return stack


def _add_halves(partials: list[list[jax.Array]], factor) -> list[jax.Array]:
    """Partial sums added in ascending order, times the factor."""
    return [factor * functools.reduce(jnp.add, halves) for halves in zip(*partials, strict=True)]
