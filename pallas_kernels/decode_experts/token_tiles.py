"""Which tokens are the columns of an expert's products: what expert_major's programs ask.

Two kinds of tiles answer, N columns with one expert each:

    gathered   each expert's tokens side by side, found by a launch of its own   (gather_rows.py)
    batch      all tokens, for every expert: at most 8, and nothing is gathered  (batch_tiles.py)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax


class Tile(NamedTuple):
    """One tile, in a kernel.

    Attributes:
      expert: its expert; -1 for a tile that is not used, or not this program's business.
      first_row: of its N rows in the x operand; a multiple of 8.
      owners: whose columns they are, as the tiles that found it want to know it.
    """

    expert: jax.Array
    first_row: jax.Array
    owners: Any


class TokenTiles(Protocol):
    """A batch's tiles.

    Attributes:
      N: columns of a tile.
      count: tiles, used or not.
      num_outputs: rows of outputs.
      operands: what `find`, `load_weights` and the ring read in a kernel: the table of tiles, the
        routing weights, float32, and rows of x.
      row_of: [T, K] int32, the row of outputs of assignment (t, k); -1 where it is padding.
    """

    N: int
    count: int
    num_outputs: int

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]: ...

    @property
    def row_of(self) -> jax.Array: ...

    def used(self, table: Any) -> jax.Array | int:
        """So many tiles come first, and those after them have no expert."""
        ...

    def find(self, table: Any, index: jax.Array) -> Tile:
        """The index-th tile; `table` is the first operand in global memory."""
        ...

    def for_each_owned(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        """Calls do(column, row of outputs) for each column that has an owner."""
        ...

    def load_weights(self, weights: Any, tile: Tile) -> jax.Array:
        """[N], the columns' routing weights as gated.hidden takes them; of nobody's, anything."""
        ...
