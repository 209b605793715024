"""The two phases of decode_attention as tasks of a step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.merge_splits import MergeSplits
from pallas_kernels.decode_attention.reference import reference_attend
from pallas_kernels.decode_attention.split_attention import SplitAttention
from pallas_kernels.decode_step.add_residual import inverse_rms, squares_piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendWork:
    """Reads what SplitAttention.run says and squares, changes keys and values [B * kv * C, D].

    Attributes:
      phase: what its blocks do.
      H, eps: of the norm whose division is yet to be done, see AddResidual.
      after: the kind of task that writes qkv.
    """

    phase: SplitAttention
    H: int
    eps: float
    after: str

    @property
    def num_blocks(self) -> int:
        return self.phase.num_blocks

    @property
    def num_counters(self) -> int:
        """One for each row and kv head."""
        return self.phase.B * self.phase.kv

    @property
    def arrivals(self) -> int:
        return self.phase.num_groups

    @property
    def bytes_read(self) -> int:
        """Of a full cache."""
        return self.num_counters * self.phase.C * self.phase.D * 4

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return dict(zip(("sums", "log_weights"), self.phase.out_types, strict=True))

    def shared_types(self) -> tuple:
        return (self.phase.shared_types(),)

    def barrier_types(self) -> Any:
        return self.phase.full_type()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Signals the counter of its row and kv head."""
        names = (
            "qkv", "cos", "sin", "q_norm", "k_norm", "lengths", "valid", "keys", "values", "sums",
            "log_weights",
        )  # fmt: skip
        (smem,) = shared
        row = lax.div(lax.rem(block_id, self.num_counters), self.phase.kv)

        self.phase.run(
            block_id, *(arrays[name] for name in names), smem, full,
            wait=lambda: wait(self.after),
            signal=signal,
            squares=squares_piece(arrays["squares"], row),
            factor=lambda squares: inverse_rms(squares, self.H, self.eps),
        )  # fmt: skip

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The whole attention: sums are [B, heads * D] already, and log_weights nothing."""
        phase = self.phase
        cache = (phase.B, phase.kv, phase.C, phase.D)
        given = dict(arrays) | {name: arrays[name].reshape(cache) for name in ("keys", "values")}
        mean = jnp.sum(given.pop("squares"), axis=0) / self.H
        given["qkv"] *= lax.rsqrt(mean + self.eps)[:, None, None]
        attended, keys, values = reference_attend(**given, eps=phase.eps)
        return {
            "sums": attended,
            "log_weights": None,
            "keys": keys.reshape(-1, phase.D),
            "values": values.reshape(-1, phase.D),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeWork:
    """Reads sums, log_weights, lengths and valid; makes attended [N, heads * D] bf16.

    Mailed, attended is float32, and its reader rounds it.

    Attributes:
      phase: what its blocks do.
      N: rows of attended; those from B on stay unwritten.
      mailed: whether all of this is in mailboxes.
      after: the kind of task that writes the sums.
    """

    phase: MergeSplits
    N: int
    after: str
    mailed: bool = False

    num_counters = 1
    bytes_read = 0

    @property
    def num_blocks(self) -> int:
        return self.phase.num_blocks

    @property
    def arrivals(self) -> int:
        return self.num_blocks

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.N, self.phase.out_type.shape[1])
        dtype = jnp.float32 if self.mailed else jnp.bfloat16
        return {"attended": jax.ShapeDtypeStruct(shape, dtype)}

    def shared_types(self) -> tuple:
        return ()

    def barrier_types(self) -> Any:
        return ()

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Waits for its row's and kv head's counter."""
        del shared, full
        names = ("sums", "log_weights", "lengths", "valid", "attended")
        self.phase.run(
            block_id, *(arrays[name] for name in names),
            lambda pair: wait(self.after, pair), signal,
        )  # fmt: skip

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """From the reference of AttendWork."""
        attended = arrays["sums"]
        padding = ((0, self.N - attended.shape[0]), (0, 0))
        return {"attended": jnp.pad(attended.astype(jnp.bfloat16), padding)}
