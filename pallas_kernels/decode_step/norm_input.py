"""The experts' input: RMSNorm of one token in each thread block, beside the router's top-k."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_step.add_residual import inverse_rms, squares_piece
from pallas_kernels.mosaic.mailbox import Mailbox, Piece, collect
from pallas_kernels.mosaic.warpgroup import row_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormInput:
    """Block t: normed[t] = total[t] / sqrt(mean of its squares + eps) * norm_weight.

    Reads total, squares and norm_weight as AddResidual has them. Writes normed [N, H] bf16.

    It is no part of top-k, because the experts' blocks should know that normed is there before
    they ask for weights: what a block polls for behind its own loads takes as long as these.

    Attributes:
      T, H: tokens, their size.
      N: rows of normed; those from T on stay unwritten.
      eps: of the norm.
      after: the kind of task that writes total.
      mailed: whether total and squares are in mailboxes.
    """

    T: int
    H: int
    N: int
    eps: float
    after: str
    mailed: bool = False

    num_counters = 1
    bytes_read = 0

    @property
    def num_blocks(self) -> int:
        return self.T

    @property
    def arrivals(self) -> int:
        return self.T

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"normed": jax.ShapeDtypeStruct((self.N, self.H), jnp.bfloat16)}

    def shared_types(self) -> tuple:
        """None."""
        return ()

    def barrier_types(self) -> Any:
        return ()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """All of token block_id."""
        del shared, full
        layout = row_layout(self.H)
        norm_weight = plgpu.load(arrays["norm_weight"], layout=layout, optimized=False)
        wait(self.after)
        squares, total = squares_piece(arrays["squares"], block_id), arrays["total"].at[block_id]
        if isinstance(total, Mailbox):
            squares, row = collect([squares, Piece(total, layout)])
        else:
            row = plgpu.load(total, layout=layout, optimized=False).astype(jnp.float32)
            (squares,) = collect([squares])
        normed = row * inverse_rms(squares, self.H, self.eps) * norm_weight.astype(jnp.float32)
        arrays["normed"][block_id] = normed.astype(jnp.bfloat16)
        signal()

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The same in plain jnp."""
        mean = jnp.sum(arrays["squares"], axis=0)[:, None] / self.H
        normed = arrays["total"].astype(jnp.float32) * lax.rsqrt(mean + self.eps)
        normed = normed * arrays["norm_weight"].astype(jnp.float32)
        return {"normed": normed.astype(jnp.bfloat16)}
