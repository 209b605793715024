"""Adds to the residual stream, and begins what follows: an RMSNorm, and perhaps the router.

    block s, of 64 columns of 8 tokens
                                total = x + parts[0] + parts[1] + ...               [tokens, 64]
                                squares[s] = sum of total^2 over these columns      [tokens]
        without a gate          scaled = weight * total                             [tokens, 64]
        with the router's       partials[s] = gate[:, 64 columns] (weight * total)  [tokens, E]

A norm needs a token's whole row before anything can be divided by its root mean square. But the
division is by one number a token, so a product can come first: W (weight * x) / rms. So no block
waits for the others of its row. A task that reads a product adds the squares, and divides
(inverse_rms).

Parts are what a product split over its columns leaves, or the outputs of a token's K experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.mailbox import Mailbox, Piece, collect, post
from pallas_kernels.mosaic.operands import round_up, wgmma_operand
from pallas_kernels.mosaic.warpgroup import LANES, ROWS_BY_64, TILE_ROWS, one_per_lane

COLUMNS = 64  # of a block
_EXPERTS = 64  # rows of the gate that one wgmma takes


def padded_experts(E: int) -> int:
    """E, rounded up to whole warpgroups."""
    return round_up(E, LANES)


def squares_piece(squares: Any, token: Any) -> Piece:
    """What `collect` loads of a token's squares (see AddResidual), for inverse_rms."""
    count = squares.shape[0]
    padded = round_up(count, LANES)
    return Piece(squares.at[:, token], one_per_lane(padded), shape=(padded,), limit=count)


def inverse_rms(squares: jax.Array, H: int, eps: float) -> jax.Array:
    """1 / sqrt(mean of a token's H squares + eps), in a kernel; of what squares_piece loaded."""
    return lax.rsqrt(jnp.sum(squares) / H + eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddResidual:
    """Reads x [N, H] bf16, norm_weight [H] bf16, parts [num_parts, N, H] float32.

    Masked, it reads valid [T] int32, too, and adds nothing to a token where that is 0. With E it
    reads gate [E, H] bf16.

    Makes squares [H / 64, N] float32, total [N, H] bf16; then scaled [N, H] bf16, or with E
    partials [H / 64, N, E rounded up to 128] float32. Mailed, total and scaled are float32
    with bf16's values; those who read total get `words`, and with `keeps` total is written, too.

    Attributes:
      T, H: tokens, their size, a multiple of 64.
      N: rows of x, a multiple of 8; those from T on may hold anything.
      num_parts: what is added to x, at least one.
      masked: whether to look at valid.
      E: experts of the router; 0 for none.
      mailed: whether x, parts and all that others read are in mailboxes, or are there before.
      keeps: whether total is written for the next grid.
      after: the kind of task that writes the parts; "" if they are there from the start.
    """

    T: int
    H: int
    N: int
    num_parts: int
    masked: bool = False
    E: int = 0
    mailed: bool = False
    keeps: bool = True
    after: str = ""

    num_counters = 1

    @property
    def num_blocks(self) -> int:
        return self._column_blocks * (self.N // TILE_ROWS)

    @property
    def _column_blocks(self) -> int:
        return self.H // COLUMNS

    @property
    def arrivals(self) -> int:
        return self.num_blocks

    @property
    def bytes_read(self) -> int:
        return 2 * self.E * self.H

    @property
    def _expert_blocks(self) -> int:
        return -(-self.E // _EXPERTS)

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        struct, row = jax.ShapeDtypeStruct, (self.N, self.H)
        types = {"squares": struct((self._column_blocks, self.N), jnp.float32)}
        if self.keeps:
            types["total"] = struct(row, jnp.bfloat16)
        if self.mailed:
            types["words"] = struct(row, jnp.float32)
        if self.E:
            shape = (self._column_blocks, self.N, padded_experts(self.E))
            return types | {"partials": struct(shape, jnp.float32)}
        return types | {"scaled": struct(row, jnp.float32 if self.mailed else jnp.bfloat16)}

    def shared_types(self) -> tuple:
        """With a gate: its columns, and the tokens as the tensor cores read them."""
        if not self.E:
            return ()
        gate = wgmma_operand(self._expert_blocks, _EXPERTS, COLUMNS)
        return ([gate, wgmma_operand(TILE_ROWS, COLUMNS)],)

    def barrier_types(self) -> Any:
        return plgpu.Barrier(num_arrivals=self._expert_blocks) if self.E else ()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Block g * H / 64 + s does columns from 64 s on of tokens from 8 g on."""
        group, column_block = (
            lax.div(block_id, jnp.int32(self._column_blocks)),
            lax.rem(block_id, jnp.int32(self._column_blocks)),
        )
        columns = pl.ds(column_block * COLUMNS, COLUMNS)
        rows, there = pl.ds(group * TILE_ROWS, TILE_ROWS), self.T - group * TILE_ROWS
        if self.E:
            gate_smem, tokens_smem = shared[0]
            for part in range(self._expert_blocks):
                experts = pl.ds(block_id * 0 + part * _EXPERTS, _EXPERTS)  # perhaps beyond the end
                piece = arrays["gate"].at[experts, columns]
                plgpu.copy_gmem_to_smem(piece, gate_smem.at[part], full)
        weight = plgpu.load(
            arrays["norm_weight"].at[columns], layout=ROWS_BY_64.reduce(0), optimized=False
        )
        weight = lax.broadcast_in_dim(weight.astype(jnp.float32), (TILE_ROWS, COLUMNS), (1,))
        weight = plgpu.layout_cast(weight, ROWS_BY_64)
        if self.after:
            wait(self.after)

        total = self._total(arrays, group, rows, columns)
        scaled = (total * weight).astype(jnp.bfloat16)
        if self.E:
            tokens_smem[...] = scaled
        elif self.mailed:
            words = scaled.astype(jnp.float32)
            post(arrays["scaled"].at[rows, columns], words, ROWS_BY_64, limit=there)
        else:
            arrays["scaled"][rows, columns] = scaled
        squares = jnp.sum(total * total, axis=1)
        by_row = ROWS_BY_64.reduce(1)
        post(arrays["squares"].at[column_block, rows], squares, by_row, limit=there)
        rounded = total.astype(jnp.bfloat16)
        if "words" in arrays:
            words = rounded.astype(jnp.float32)
            post(arrays["words"].at[rows, columns], words, ROWS_BY_64, limit=there)
        if "total" in arrays:
            arrays["total"][rows, columns] = rounded
        if self.E:
            plgpu.commit_smem()
            plgpu.barrier_wait(full)
            for part in range(self._expert_blocks):
                experts = pl.ds(part * _EXPERTS, _EXPERTS)
                out = arrays["partials"].at[column_block, rows, experts]
                _multiply(gate_smem.at[part], tokens_smem, out, there)
        signal()

    def _total(self, arrays, group, rows, columns) -> jax.Array:
        """[8, 64] float32; all loads are under way before the first addition."""

        def piece(ref):
            return Piece(ref, ROWS_BY_64, limit=self.T - group * TILE_ROWS)

        x = arrays["x"].at[rows, columns]
        parts = [piece(arrays["parts"].at[part, rows, columns]) for part in range(self.num_parts)]
        if isinstance(arrays["x"], Mailbox):
            total, *parts = collect([piece(x), *parts])
        else:
            total = plgpu.load(x, layout=ROWS_BY_64, optimized=False).astype(jnp.float32)
            parts = collect(parts)
        added = total
        for part in parts:
            added += part
        if not self.masked:
            return added
        place = plgpu.broadcasted_iota(jnp.int32, added.shape, 0, layout=ROWS_BY_64)
        counts = jnp.zeros_like(place)
        for row in range(min(TILE_ROWS, self.T)):
            token = jnp.minimum(group * TILE_ROWS + row, self.T - 1)
            counts = jnp.where(place == row, jnp.full_like(place, arrays["valid"][token]), counts)
        # Select, never multiply by zero: what lies at an unwritten row may be inf or NaN.
        return jnp.where(counts > 0, added, total)

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The same in plain jnp."""
        parts = arrays["parts"]
        if self.masked:
            valid = jnp.pad(arrays["valid"], (0, self.N - self.T))
            parts = jnp.where(valid[:, None] > 0, parts, 0)
        total = arrays["x"].astype(jnp.float32) + jnp.sum(parts, axis=0)
        by_block = total.reshape(self.N, -1, COLUMNS)
        rounded = total.astype(jnp.bfloat16)
        found = {
            "total": rounded,
            "words": rounded.astype(jnp.float32),
            "squares": jnp.sum(by_block * by_block, axis=2).T,
        }
        scaled = total * arrays["norm_weight"].astype(jnp.float32)
        if not self.E:
            return found | {"scaled": scaled.astype(jnp.bfloat16)}  # any reader casts it
        gate = arrays["gate"].astype(jnp.float32).reshape(self.E, -1, COLUMNS)
        tokens = scaled.astype(jnp.bfloat16).astype(jnp.float32).reshape(self.N, -1, COLUMNS)
        partials = jnp.einsum("nsk,esk->sne", tokens, gate, precision=lax.Precision.HIGHEST)
        return found | {"partials": jnp.pad(partials, ((0, 0), (0, 0), (0, -self.E % LANES)))}


def _multiply(gate_smem, tokens_smem, out, there) -> None:
    """Out [8, 64] = tokens [8, 64] times the gate's 64 experts; as many tokens as are there."""

    def multiply(acc):
        plgpu.wgmma(acc, gate_smem, tokens_smem.transpose((1, 0)))
        return acc[...]

    sums = pl.run_scoped(multiply, plgpu.ACC((_EXPERTS, tokens_smem.shape[0]), jnp.float32))
    post(out, sums, plgpu.Layout.WGMMA, limit=there, transposed=True)
