"""Batches of packed documents, each a function of the step's number.

Documents are laid end to end and cut into rows of S tokens. A document's tokens are one segment of
a row, which attends to itself only. Example, S = 6, documents of 4 and 5 tokens:

    tokens     a0 a1 a2 a3 b0 b1    b2 b3 b4 .  .  .
    segments    0  0  0  0  1  1     1  1  1 -1 -1 -1     -1 is padding
    predicts    1  2  3  -  5  -     1  2  -  -  -  -     the column of the target
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.losses import IGNORED_LABEL
from moe_jax.parallelism import Parallelism
from moe_jax.traces import RoutingTrace

PADDING_SEGMENT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step trains on: A micro-batches of B rows of S tokens.

    The step is the same, but for rounding, as that of one micro-batch of A * B rows.

    Attributes:
      input_ids: [A, B, S] int32.
      labels: [A, B, S] int32, -100 where a token is not to be predicted.
      segment_ids: [A, B, S] int32, equal for the tokens of one sequence of a row; negative for
        padding, which predicts nothing, is not predicted, and is routed nowhere.
      replay: experts [A, MoE layers, B*S, K], in place of the routers' choice: those that a rollout
        chose, or as even a load as a measurement needs. Without expert_weights the routers weigh
        them, so that gradients reach the routers. None: the routers choose.
    """

    input_ids: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    replay: RoutingTrace | None = None


class PackedDocuments:
    """Documents as rows of S tokens, dealt out in an order that `seed` gives, anew in each epoch.

    Attributes:
      rows: how many rows an epoch has.
    """

    def __init__(self, documents: Sequence[Sequence[int]], S: int, *, seed: int = 0):
        """Packs the documents.

        Args:
          documents: token ids of each; one without tokens adds nothing.
          S: tokens in a row, at least 2, because one token predicts nothing.
          seed: of the order of the rows.

        Raises:
          ValueError: S is below 2, or the documents have fewer than 2 tokens.
        """
        if S < 2:
            raise ValueError(f"S is {S}; expected at least 2 tokens in a row")
        lengths = [len(document) for document in documents]
        total = sum(lengths)
        if total < 2:
            raise ValueError(f"documents have {total} tokens together; expected at least 2")
        self.rows, self._seed = -(-total // S), seed
        padded = self.rows * S
        tokens = np.zeros(padded, np.int32)
        tokens[:total] = np.concatenate([np.asarray(d, np.int32) for d in documents if len(d)])
        segments = np.full(padded, PADDING_SEGMENT, np.int32)
        segments[:total] = np.repeat(np.arange(len(lengths)), lengths)
        self._tokens, self._segments = tokens.reshape(-1, S), segments.reshape(-1, S)

    def batch(self, step: int, *, A: int, B: int, rows: slice = slice(None)) -> Batch:
        """The batch of this step: rows step * A * B and on, one epoch after the other.

        Labels are the tokens, -100 for padding.

        Args:
          step: from 0 up; the same one gives the same batch.
          A: micro-batches.
          B: rows of each.
          rows: of the B of each micro-batch, those that the result has.

        Raises:
          ValueError: step is negative, or A or B is below 1.
        """
        for name, value, least in (("step", step, 0), ("A", A, 1), ("B", B, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        places = np.arange(step * A * B, (step + 1) * A * B).reshape(A, B)[:, rows].reshape(-1)
        epochs = places // self.rows
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
            chosen[epochs == epoch] = order[places[epochs == epoch] % self.rows]
        shape = (A, -1, self._tokens.shape[1])
        tokens, segments = self._tokens[chosen], self._segments[chosen]
        labels = np.where(segments == PADDING_SEGMENT, IGNORED_LABEL, tokens)
        return Batch(
            input_ids=tokens.reshape(shape),
            labels=labels.reshape(shape),
            segment_ids=segments.reshape(shape),
        )

    def batch_on_mesh(self, step: int, *, A: int, B: int, parallelism: Parallelism | None) -> Batch:
        """`batch` on a mesh of one process or of several, each of which reads its devices' rows.

        Args:
          step, A, B: as `batch` takes them, of all processes.
          parallelism: the mesh; None gives what `batch` gives.

        Raises:
          ValueError: as `batch`, or the mesh does not divide B.
        """
        if parallelism is None:
            return self.batch(step, A=A, B=B)
        axes = parallelism.rows("training", B)
        sharding = parallelism.sharding(None, axes)
        shape = (A, B, self._tokens.shape[1])
        parts: dict[tuple[int, int], Batch] = {}
        names = ("input_ids", "labels", "segment_ids")

        def part(index: tuple[slice, ...], name: str) -> np.ndarray:
            first, last, _ = index[1].indices(B)
            if (first, last) not in parts:
                parts[first, last] = self.batch(step, A=A, B=B, rows=slice(first, last))
            return getattr(parts[first, last], name)

        return Batch(**{
            name: jax.make_array_from_callback(
                shape, sharding, functools.partial(part, name=name)
            )
            for name in names
        })  # fmt: skip
