"""Brings the next layer's attention weights to L2 while this layer waits for its router.

From the end of the output projection to the first expert's weights, memory would have nothing to
do: which experts come next is not known before the top-k. The next layer's q, k, v and o are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic.grid_sync import pause
from pallas_kernels.mosaic.l2_hints import prefetch_rows
from pallas_kernels.mosaic.warpgroup import LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Reads weights_0, weights_1, ... [rows, columns] bf16 into L2, and writes nothing.

    Attributes:
      shapes: of the arrays.
      pieces: of a row, asked for one after the other.
      pause_ns: between two pieces, because other blocks need memory, too.
    """

    shapes: tuple[tuple[int, int], ...]
    pieces: int = 4
    pause_ns: int = 1000

    num_counters = 0
    arrivals = 0

    @property
    def num_blocks(self) -> int:
        return sum(-(-rows // LANES) for rows, _ in self.shapes)

    @property
    def bytes_read(self) -> int:
        return sum(2 * rows * columns for rows, columns in self.shapes)

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {}

    def shared_types(self) -> tuple:
        return ()

    def barrier_types(self) -> Any:
        return ()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """128 rows of one array."""
        del shared, full, wait, signal
        first = 0
        for index, (rows, columns) in enumerate(self.shapes):
            blocks, local = -(-rows // LANES), block_id - first
            width = columns // self.pieces // 8 * 8

            @pl.when((local >= 0) & (local < blocks))
            def _(index=index, local=local, width=width):
                for piece in range(self.pieces):
                    part = slice(piece * width, (piece + 1) * width)
                    prefetch_rows(arrays[f"weights_{index}"], local * LANES, LANES, part)
                    pause(self.pause_ns)

            first += blocks

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Nothing is computed."""
        return {}
