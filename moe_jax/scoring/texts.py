"""`score`: the windows that texts are read in, batches of them, and each token's scores.

A text is read in windows of at most `context` tokens, each from an empty cache. A token is scored
once, by the window in which it is among the last `stride`. With context 4 and stride 2:

    window   reads     scores
    0        0 1 2 3   1 2 3 4
    1        2 3 4 5   5 6
    2        4 5 6 7   7 8
    3        5 6 7 8   9          the last one is full too, so that 9 sees all that it may

Two scorers are compared position by position, because two models' distributions over a text are
too large to keep: from the full float32 log-softmax of both, a few numbers a token stay.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.generation.arguments import position_limit, token_array, whole_number
from moe_jax.scoring.scorer import Reading, Scorer, score_logits


class Window(NamedTuple):
    """Reads tokens [begin, end - 1) and scores [first, end)."""

    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """How many tokens it reads."""
        return self.end - 1 - self.begin


def windows(N: int, context: int, stride: int) -> list[Window]:
    """The windows of a text of N tokens; together they score tokens 1 to N - 1 once each.

    Args:
      N: at least 2.
      context: the most tokens that a window reads.
      stride: how many tokens a window scores, 1 to `context`; the first one scores all it can.
    """
    ends = [*range(min(context + 1, N), N, stride), N]
    return [
        Window(max(0, end - 1 - context), first, end)
        for first, end in zip([1, *ends[:-1]], ends, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScores:
    """A text's tokens, scored by one scorer or by two.

    Attributes:
      token_ids: [N] int32.
      contexts: [N] int32, how many tokens the prediction of each has seen; 0 where there is none.
      logprobs: [scorers, N] float32, natural logarithms; NaN for the first token, which nothing
        predicts.
      top_ids: [scorers, N] int32, the likeliest token there; -1 likewise.
      kl: [N] float32, KL(first || second) of the two predictions; NaN likewise; None with one.
    """

    token_ids: np.ndarray
    contexts: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    kl: np.ndarray | None

    def log_likelihood(self, scorer: int = 0) -> float:
        """The sum of the scored tokens' log-probabilities, added up in float64."""
        return float(self.logprobs[scorer, 1:].sum(dtype=np.float64))

    def perplexity(self, scorer: int = 0) -> float:
        """`perplexity` of the scored tokens."""
        return perplexity(self.log_likelihood(scorer), len(self.token_ids) - 1)


def perplexity(log_likelihood: float, count: int) -> float:
    """Is exp(-log_likelihood / count), of `count` tokens; inf where that overflows."""
    try:
        return math.exp(-log_likelihood / count)
    except OverflowError:
        return math.inf


def score(
    scorers: Sequence[Scorer],
    texts: Sequence[Sequence[int]],
    *,
    context: int,
    stride: int,
    batch: int = 8,
    chunk: int = 64,
    on_batch: Callable[[int, int], None] = lambda number, total: None,
) -> list[TextScores]:
    """Scores every text; the results do not depend on `batch` and `chunk` but for rounding.

    Args:
      scorers: one, or two to compare; both read the same tokens.
      texts: token ids, at least two each.
      context, stride: of the windows, as `windows` has them.
      batch: windows that are rows of one batch.
      chunk: columns that run at once, at least 2, because one column is a decode step. The logits
        of batch * chunk positions are in memory together.
      on_batch: called before each batch with its number and how many there are.

    Raises:
      ValueError, TypeError: an argument cannot be; names it, its value and what is accepted.
      NotImplementedError: a backend that was asked for cannot do this; the message says who can.
      FloatingPointError: a prediction is NaN; names the text and the token.
    """
    _check_scorers(scorers)
    V = scorers[0].model.config.vocab_size
    limits = [position_limit(scorer.model.config) for scorer in scorers]
    limit = min((most for most in limits if most is not None), default=None)
    context = whole_number("context", context, 1, limit, ", as max_position_embeddings is")
    stride = whole_number("stride", stride, 1, context, ", as the context is")
    batch = whole_number("batch", batch, 1)
    chunk = whole_number("chunk", chunk, 2)
    rows = [_check_text(f"texts[{i}]", ids, V) for i, ids in enumerate(texts)]
    found = [_nothing_scored(ids, scorers) for ids in rows]
    jobs = [
        (text, window)
        for text, ids in enumerate(rows)
        for window in windows(len(ids), context, stride)
    ]
    if not jobs:
        return []
    longest = max(window.length for _, window in jobs)
    batch, chunk = min(batch, len(jobs)), min(chunk, max(2, longest))
    readings = [Reading(scorer, batch, longest) for scorer in scorers]
    platform = scorers[0].plan.platform
    starts = range(0, len(jobs), batch)
    for number, start in enumerate(starts):
        on_batch(number, len(starts))
        some = jobs[start : start + batch]
        columns = _columns(some, rows, batch, chunk)
        _store(found, some, columns, _run(readings, columns, chunk, platform), chunk)
        _expect_numbers(found, some)
    return found


def _check_scorers(scorers: Sequence[Scorer]) -> None:
    if len(scorers) not in (1, 2):
        raise ValueError(f"scorers has {len(scorers)}; expected one, or two to compare")
    sizes = [scorer.model.config.vocab_size for scorer in scorers]
    if len(set(sizes)) > 1:
        raise ValueError(f"scorers have vocab_size {sizes}; expected models of the same tokens")


def _check_text(name: str, ids: Sequence[int], V: int) -> np.ndarray:
    tokens = token_array(name, ids, V)
    if len(tokens) < 2:
        raise ValueError(f"{name} has {len(tokens)} tokens; expected at least 2, one to predict")
    return tokens


def _nothing_scored(ids: np.ndarray, scorers: Sequence[Scorer]) -> TextScores:
    shape = (len(scorers), len(ids))
    return TextScores(
        token_ids=ids,
        contexts=np.zeros(len(ids), np.int32),
        logprobs=np.full(shape, np.nan, np.float32),
        top_ids=np.full(shape, -1, np.int32),
        kl=np.full(len(ids), np.nan, np.float32) if len(scorers) == 2 else None,
    )


class _Columns(NamedTuple):
    """A batch's windows as rows, padded on the right to whole chunks; all [B, S].

    Attributes:
      ids: int32.
      valid: bool.
      targets: int32, the token that each column predicts; -1 where that is not scored.
    """

    ids: np.ndarray
    valid: np.ndarray
    targets: np.ndarray


_Jobs = Sequence[tuple[int, Window]]  # which text, and which window of it


def _columns(jobs: _Jobs, rows: Sequence[np.ndarray], B: int, chunk: int) -> _Columns:
    S = -(-max(window.length for _, window in jobs) // chunk) * chunk
    ids, targets = np.zeros((B, S), np.int32), np.full((B, S), -1, np.int32)
    valid = np.zeros((B, S), bool)
    for row, (text, window) in enumerate(jobs):
        ids[row, : window.length] = rows[text][window.begin : window.end - 1]
        valid[row, : window.length] = True
        scored = slice(window.first - 1 - window.begin, window.length)
        targets[row, scored] = rows[text][window.first : window.end]
    return _Columns(ids, valid, targets)


def _run(readings: Sequence[Reading], columns: _Columns, chunk: int, platform: str) -> dict:
    """What is kept of each chunk of columns that has targets, by its first column.

    It is on the device still, so that the next chunk is started before one is read.
    """
    for reading in readings:
        reading.begin()
    kept = {}
    for first in range(0, columns.ids.shape[1], chunk):
        ids, valid, targets = (array[:, first : first + chunk] for array in columns)
        logits = tuple(reading.advance(ids, valid) for reading in readings)
        if (targets >= 0).any():
            kept[first] = score_logits(platform, logits, targets)
    return kept


def _store(found: list[TextScores], jobs: _Jobs, columns: _Columns, kept: dict, chunk: int) -> None:
    for first, arrays in kept.items():
        arrays = jax.tree.map(np.asarray, arrays)
        for row, (text, window) in enumerate(jobs):
            own = np.flatnonzero(columns.targets[row, first : first + chunk] >= 0)
            scores, places = found[text], window.begin + first + own + 1
            scores.contexts[places] = places - window.begin
            scores.logprobs[:, places] = arrays.logprobs[:, row, own]
            scores.top_ids[:, places] = arrays.top_ids[:, row, own]
            if scores.kl is not None:
                scores.kl[places] = arrays.kl[row, own]


def _expect_numbers(found: list[TextScores], jobs: _Jobs) -> None:
    for text in sorted({text for text, _ in jobs}):
        scores = found[text]
        spoilt = np.isnan(scores.logprobs) & (scores.contexts > 0)
        for place, scorer in np.argwhere(spoilt.T).tolist():
            raise FloatingPointError(
                f"texts[{text}]: the logits that predict its token {place} are NaN in scorers["
                f"{scorer}]. Look for NaN in the weights, or for overflow in their dtype"
            )
