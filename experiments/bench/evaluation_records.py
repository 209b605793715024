"""What experiments.evaluate found: rows for a JSONL, every token for an .npz, and a table.

    {"kind": "score", "run": 0, "way": 0, "text": "book.txt", "perplexity": 8.412, ...}
    {"kind": "difference", "run": 0, "text": "book.txt", "mean_kl": 0.0021, ...}

The file around them is that of records.py. With several texts, a row of each and one of all.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench import records
from experiments.bench.environment import Environment
from experiments.bench.tables import runs_of
from moe_jax.scoring import TextScores, perplexity
from moe_jax.traces import save_arrays

ALL = "all texts"


@dataclasses.dataclass(kw_only=True)
class ScoreRow:
    """One text under one way of computing.

    Attributes:
      run: where and how it was computed.
      kind: "score".
      text: the file; ALL for all of them together.
      way: 0, or 1 for what --compare says.
      computed: the flags that say how.
      backends: what computed each op.
      context, stride: of the windows that the text was read in.
      tokens: of the text, a BOS token included.
      scored: tokens that something predicts.
      log_likelihood: the sum of their natural log-probabilities.
      perplexity: exp(-log_likelihood / scored).
    """

    run: Environment
    kind: str = "score"
    text: str
    way: int
    computed: dict[str, str]
    backends: dict[str, str]
    context: int
    stride: int
    tokens: int
    scored: int
    log_likelihood: float
    perplexity: float | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.kind, self.text, self.way

    @property
    def name(self) -> str:
        """As a line about the run says it."""
        return self.text


@dataclasses.dataclass(kw_only=True)
class DifferenceRow:
    """One text, the second way of computing against the first.

    Attributes:
      run, text, scored: as in ScoreRow.
      kind: "difference".
      mean_kl: the mean of KL(first || second) over the scored tokens, in nats, from full float32
        log-softmaxes.
      max_kl: the largest one.
      top_agreement: the share of scored tokens where the likeliest token is the same.
      largest_difference: of a token's log-probability, the second's less the first's.
      largest_at: that token's number in its text; None in the row of all texts.
    """

    run: Environment
    kind: str = "difference"
    text: str
    scored: int
    mean_kl: float | None
    max_kl: float | None
    top_agreement: float
    largest_difference: float | None
    largest_at: int | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.kind, self.text

    @property
    def name(self) -> str:
        """As a line about the run says it."""
        return self.text


KINDS: Mapping[str, type] = {"score": ScoreRow, "difference": DifferenceRow}


def make_rows(
    run: Environment,
    *,
    texts: Sequence[str],
    found: Sequence[TextScores],
    ways: Sequence[dict[str, str]],
    backends: Sequence[dict[str, str]],
    context: int,
    stride: int,
) -> list[ScoreRow | DifferenceRow]:
    """A row for each text and way, then for each text the difference of the ways.

    Args:
      run: where it was computed.
      texts: the files' names.
      found: the scores of each.
      ways: how each scorer computed, the flags.
      backends: what computed each op, for each scorer.
      context, stride: of the windows.
    """
    named = list(zip(texts, ([scores] for scores in found), strict=True))
    if len(texts) > 1:
        named.append((ALL, list(found)))
    rows: list[ScoreRow | DifferenceRow] = []
    for way, computed in enumerate(ways):
        for text, parts in named:
            log_likelihood = sum(scores.log_likelihood(way) for scores in parts)
            tokens = sum(len(scores.token_ids) for scores in parts)
            rows.append(
                ScoreRow(
                    run=run,
                    text=text,
                    way=way,
                    computed=computed,
                    backends=backends[way],
                    context=context,
                    stride=stride,
                    tokens=tokens,
                    scored=tokens - len(parts),
                    log_likelihood=log_likelihood,
                    perplexity=perplexity(log_likelihood, tokens - len(parts)),
                )
            )
    if len(ways) == 2:
        rows += [difference(run, text, parts) for text, parts in named]
    return rows


def difference(run: Environment, text: str, parts: Sequence[TextScores]) -> DifferenceRow:
    """The second way against the first over some texts together."""
    kl = _joined(scores.kl for scores in parts)
    same = _joined(scores.top_ids[0] == scores.top_ids[1] for scores in parts)
    # Where both are -inf nothing differs.
    with np.errstate(invalid="ignore"):
        moved = _joined(scores.logprobs[1] - scores.logprobs[0] for scores in parts)
    moved = np.nan_to_num(moved, nan=0.0, posinf=np.inf, neginf=-np.inf)
    largest = int(np.abs(moved).argmax())
    return DifferenceRow(
        run=run,
        text=text,
        scored=len(kl),
        mean_kl=float(kl.mean(dtype=np.float64)),
        max_kl=float(kl.max()),
        top_agreement=float(same.mean()),
        largest_difference=float(moved[largest]),
        largest_at=largest + 1 if len(parts) == 1 else None,
    )


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Of several texts, without the first token of each, which nothing predicts."""
    return np.concatenate([array[1:] for array in arrays])


def save_tokens(
    path: pathlib.Path, rows: Sequence[ScoreRow | DifferenceRow], found: Sequence[TextScores]
) -> None:
    """Writes every token's scores as an .npz, which appears whole or not at all.

    The texts are one after the other; N tokens together, and `ways` is 1 or 2:

        texts       [texts] str, the files' names, and `ends` [texts] int64, where each ends
        computed    [ways] str, JSON, how
        token_ids   [N] int32
        contexts    [N] int32, how many tokens the prediction has seen; 0 where there is none
        logprobs    [ways, N] float32, natural logarithms; NaN where there is none
        top_ids     [ways, N] int32, the likeliest token; -1 where there is none
        kl          [N] float32, KL(first || second), with two ways
    """
    scored = [row for row in rows if isinstance(row, ScoreRow)]
    computed = {row.way: row.computed for row in scored}
    arrays = {
        "texts": np.array([row.text for row in scored if row.way == 0][: len(found)]),
        "ends": np.cumsum([len(scores.token_ids) for scores in found]),
        "computed": np.array([json.dumps(computed[way]) for way in sorted(computed)]),
    }
    for name in ("token_ids", "contexts", "logprobs", "top_ids", "kl"):
        parts = [getattr(scores, name) for scores in found]
        if parts[0] is not None:
            arrays[name] = np.concatenate(parts, axis=-1)
    save_arrays(path, arrays)


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a file of evaluate.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    return records.read_record(path, KINDS)


def print_rows(console: Console, rows: Sequence[ScoreRow | DifferenceRow]) -> None:
    """Prints a table of each kind, and where it was computed."""
    scores = [row for row in rows if isinstance(row, ScoreRow)]
    differences = [row for row in rows if isinstance(row, DifferenceRow)]
    several = any(row.way for row in scores)
    windows = f"windows of {scores[0].context} tokens, {scores[0].stride} apart"
    table = Table(title=f"Scores, {windows}", title_justify="left")
    for title in ("text", *["way"] * several, "tokens", "scored", "log-likelihood", "perplexity"):
        table.add_column(title, justify="left" if title == "text" else "right")
    for row in scores:
        figures = [str(row.tokens), str(row.scored), f"{row.log_likelihood:.3f}"]
        way = [("first", "second")[row.way]] * several
        table.add_row(row.text, *way, *figures, f"{row.perplexity:.5g}")
    console.print(table)
    if differences:
        table = Table(title="The second against the first", title_justify="left")
        titles = (
            "mean KL, nats",
            "largest KL",
            "top-1 agreement",
            "largest difference",
            "at token",
        )
        for title in ("text", *titles):
            table.add_column(title, justify="left" if title == "text" else "right")
        for row in differences:
            where = "-" if row.largest_at is None else str(row.largest_at)
            figures = [f"{row.mean_kl:.3e}", f"{row.max_kl:.3e}", f"{100 * row.top_agreement:.2f}%"]
            table.add_row(row.text, *figures, f"{row.largest_difference:+.5f}", where)
        console.print(table)
    for way in sorted({row.way for row in scores}):
        row = next(row for row in scores if row.way == way)
        how = ", ".join(f"{name} {value}" for name, value in row.computed.items())
        by = ", ".join(f"{op} by {backend}" for op, backend in row.backends.items())
        line = f"- {('first', 'second')[way]}: {how}; {by}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in runs_of(rows[:1]):
        console.print(f"- {line}", highlight=False, markup=False)
