"""The experts' two products of expert_major as tasks of a step, for at most 8 tokens.

    gate_up     block (assignment, 32 neurons)        hidden = silu(gate_e x) * up_e x * weight
    down        block (assignment, block_m neurons)   outputs[k, t] = down_e hidden

All tokens are every expert's tile (WholeBatchTiles), so nothing is gathered. The blocks of an
assignment whose expert another one leads find that out from the ids, and end.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import BLOCK, Weight, dequantise, is_fp8
from pallas_kernels.decode_experts.expert_major_fp8 import DownFp8, GateUpFp8
from pallas_kernels.decode_experts.expert_major_kernels import Down, GateUp
from pallas_kernels.decode_experts.token_tiles import Tile, WholeBatchTiles
from pallas_kernels.mosaic.mailbox import Piece, collect
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.warpgroup import LANES, one_per_lane


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotMajorTiles(WholeBatchTiles):
    """WholeBatchTiles whose output of token t's k-th expert is row k * 8 + t.

    So the outputs are K parts of 8 tokens, which AddResidual adds as it adds any others.
    """

    @property
    def num_outputs(self) -> int:
        return self.expert_ids.shape[1] * self.N

    def for_each_valid(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        K = jnp.int32(self.expert_ids.shape[1])

        def do_row(column, row):
            do(column, lax.rem(row, K) * self.N + lax.div(row, K))

        super().for_each_valid(tile, do_row)


def slot_major_tiles(T: int, K: int, E: int, H: int) -> SlotMajorTiles:
    """Tiles of T tokens whose ids are known as the kernel runs only."""
    return SlotMajorTiles(
        x=jax.ShapeDtypeStruct((T, H), jnp.bfloat16),
        expert_ids=jax.ShapeDtypeStruct((T, K), jnp.int32),
        expert_weights=jax.ShapeDtypeStruct((T, K), jnp.float32),
        E=E,
    )


def _bytes_of(count: int, fp8: bool) -> int:
    """Bytes of that many weights, with their scales."""
    return count + 4 * count // (BLOCK[0] * BLOCK[1]) if fp8 else 2 * count


def _plain(weights: Weight, columns: int) -> jax.Array:
    """The weights as rows of that many columns, float32."""
    if is_fp8(weights):
        values = weights.values.reshape(-1, columns)
        weights = dataclasses.replace(weights, values=values)
    return dequantise(weights)


def _with_words(groups: tuple, tiles: SlotMajorTiles, dtypes: tuple) -> tuple:
    """A product's shared memory; behind the stages, what `_collected` keeps of each mailbox."""
    size = (round_up(tiles.num_tiles, LANES),)
    stages, *others = groups
    return ([*stages, *(plgpu.SMEM(size, dtype) for dtype in dtypes)], *others)


def _collected(mailboxes: tuple, shared: tuple) -> tuple[tuple, tuple]:
    """What is in mailboxes of assignments, in shared memory; and the product's own part of it."""
    first, *others = shared
    stages, kept = first[: -len(mailboxes)], first[-len(mailboxes) :]
    size = kept[0].shape[0]
    layout = one_per_lane(size)
    pieces = [Piece(ref, layout, shape=(size,), limit=ref.shape[0]) for ref in mailboxes]
    for smem, words in zip(kept, collect(pieces), strict=True):
        smem[...] = words.astype(smem.dtype)
    return tuple(kept), (stages, *others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateUpWork:
    """Reads ids, weights [T * K], tokens [8, H] and gate_up; writes hidden.

    The product says what gate_up is: [E * 2 * I, H], or FP8 as ExpertWeights.as_halves has it.

    Attributes:
      product: what its blocks do; a GateUpFp8 for FP8 weights.
      after_ids, after: the kinds of tasks that write ids and weights, and tokens.
      mailed: whether ids and weights are in mailboxes, as float32.
    """

    product: GateUp
    after_ids: str
    after: str
    mailed: bool = False

    @property
    def num_blocks(self) -> int:
        return self.product.num_blocks

    @property
    def num_counters(self) -> int:
        return self.product.tiles.num_tiles

    @property
    def arrivals(self) -> int:
        return self.product.blocks_per_tile

    @property
    def bytes_read(self) -> int:
        fp8 = isinstance(self.product, GateUpFp8)
        return self.num_counters * _bytes_of(2 * self.product.I * self.product.H, fp8)

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"hidden": self.product.out_type}

    def shared_types(self) -> tuple:
        dtypes = (jnp.int32, jnp.float32) if self.mailed else ()
        return _with_words(self.product.shared_types(), self.product.tiles, dtypes)

    def barrier_types(self) -> Any:
        return self.product.full_type()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Signals its tile's counter; a block without a tile signals nothing."""
        a = arrays
        # Tokens first, because they are there before the ids, and while memory is idle.
        wait(self.after)
        if self.mailed:
            (ids, weights), shared = _collected((a["ids"], a["weights"]), shared)
        else:
            wait(self.after_ids)
            ids, weights = a["ids"], a["weights"]
        self.product.run(
            block_id, ids, weights, a["tokens"], a["gate_up"], a["hidden"], shared, full, signal
        )  # fmt: skip

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """[T * K, I] float32 of each assignment by itself; zeros where it is padding."""
        I, H = self.product.I, self.product.H
        T, K = self.product.tiles.expert_ids.shape
        gate_up = _plain(arrays["gate_up"], H).reshape(-1, 2, I, H)
        gate_up = gate_up[jnp.maximum(arrays["ids"], 0)]
        tokens = jnp.repeat(arrays["tokens"][:T], K, axis=0).astype(jnp.float32)
        gate, up = jnp.einsum("ah,azih->zai", tokens, gate_up, precision=lax.Precision.HIGHEST)
        hidden = jax.nn.silu(gate) * up * arrays["weights"][:, None]
        return {"hidden": jnp.where(arrays["ids"][:, None] >= 0, hidden, 0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownWork:
    """Reads ids [T * K], hidden and down [E * H, I]; writes outputs [K * 8, H] float32.

    Row k * 8 + t is token t's k-th expert's. Rows of padding stay unwritten.

    Attributes:
      product: what its blocks do; a DownFp8 for FP8 weights.
      after_ids, after: the kinds of tasks that write ids and hidden.
      mailed: as GateUpWork's.
    """

    product: Down
    after_ids: str
    after: str
    mailed: bool = False

    num_counters = 0
    arrivals = 0

    @property
    def num_blocks(self) -> int:
        return self.product.num_blocks

    @property
    def bytes_read(self) -> int:
        fp8 = isinstance(self.product, DownFp8)
        return self.product.tiles.num_tiles * _bytes_of(self.product.I * self.product.H, fp8)

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"outputs": self.product.out_type}

    def shared_types(self) -> tuple:
        dtypes = (jnp.int32,) if self.mailed else ()
        return _with_words(self.product.shared_types(), self.product.tiles, dtypes)

    def barrier_types(self) -> Any:
        return self.product.full_type()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """The last task: it signals nothing, because the grid ends."""
        del signal
        a, ids = arrays, arrays["ids"]
        if self.mailed:
            (ids,), shared = _collected((ids,), shared)
        else:
            wait(self.after_ids)
        self.product.run(
            block_id, ids, a["hidden"], a["down"], a["outputs"], shared, full,
            lambda tile: wait(self.after, tile),
        )  # fmt: skip

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """From a reference's hidden; zeros where an assignment is padding."""
        I, H = self.product.I, self.product.H
        down = _plain(arrays["down"], I).reshape(-1, H, I)[jnp.maximum(arrays["ids"], 0)]
        outputs = jnp.einsum(
            "ai,ahi->ah",
            arrays["hidden"],
            down,
            precision=lax.Precision.HIGHEST,
        )
        T, K = self.product.tiles.expert_ids.shape
        outputs = outputs.reshape(T, K, H).swapaxes(0, 1)
        padding = ((0, 0), (0, self.product.tiles.N - T), (0, 0))
        return {"outputs": jnp.pad(outputs, padding).reshape(-1, H)}
