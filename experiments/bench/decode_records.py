"""The rows of decode_speed: one decode step of a whole model, timed at one batch and context.

    {"kind": "decode", "run": 0, "batch": 1, "context": 512, "ms": 4.12, "step_bytes": 6.08e9, ...}
    {"kind": "transformers", "run": 0, "batch": 1, "context": 512, "ms": 9.43, ...}

The file around them is that of records.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.bench import records
from experiments.bench.decode_bytes import StepBytes
from experiments.bench.environment import Environment


@dataclasses.dataclass(kw_only=True)
class DecodeRow:
    """One batch and context; None where a figure does not apply or was not taken.

    Attributes:
      run: where and how it was measured.
      kind: "decode" for this repository's model, "transformers" for the baseline.
      batch: rows in the batch.
      context: tokens that each row's cache holds before the first step.
      steps: of a program that is issued at once.
      feed: "given" tokens or "sampled" ones.
      ms: a step's time in a chain that never waits for the host, the median over repeats.
      ms_spread: the distance between the repeats' quartiles, ms.
      generate_ms: a step's time in `generate`, from the first token of the rows to the last.
      generate_experts, generate_step_bytes: as unique_experts and step_bytes, of `generate`.
      first_token_s: seconds from the call of `generate` to the first token, all compiled.
      unique_experts: experts that a step reads in a layer, mean over the layers of the steps timed.
      step_bytes: bytes that a step has to read, mean over the steps timed.
      expert_bytes, cache_bytes: the parts of step_bytes that batch and context decide.
      compile_s: seconds to trace, lower and compile the program.
      generate_compile_s: the same of `generate`'s: its first run less its second.
      program_bytes: the program's arguments, results and temporaries on the device.
      peak_bytes: the most that the process had allocated on the device up to this row's end.
      kernels: kernel class -> [kernels a step, us a step], where --profile asked for it.
      backends: what computed each op.
      versions: of the baseline's libraries.
      notes: what a reader should know, "error" among them.
    """

    run: Environment
    kind: str
    batch: int
    context: int
    steps: int
    feed: str = "given"
    ms: float | None = None
    ms_spread: float | None = None
    generate_ms: float | None = None
    generate_experts: float | None = None
    generate_step_bytes: float | None = None
    first_token_s: float | None = None
    unique_experts: float | None = None
    step_bytes: float | None = None
    expert_bytes: float | None = None
    cache_bytes: float | None = None
    compile_s: float | None = None
    generate_compile_s: float | None = None
    program_bytes: int | None = None
    peak_bytes: int | None = None
    kernels: dict[str, list[float]] | None = None
    backends: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    notes: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.kind, self.batch, self.context, self.feed

    @property
    def name(self) -> str:
        """As a line about the run says it."""
        return self.kind

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows of the batch, in the chain."""
        return None if self.ms is None else 1e3 * self.batch / self.ms

    @property
    def generate_tokens_per_s(self) -> float | None:
        """Of all rows of the batch, in `generate`."""
        return None if self.generate_ms is None else 1e3 * self.batch / self.generate_ms

    @property
    def limit_ms(self) -> float | None:
        """Milliseconds to read step_bytes at the run's read ceiling."""
        return self._ms_to_read(self.step_bytes)

    def _ms_to_read(self, count: float | None) -> float | None:
        ceiling = self.run.read_ceiling_tbps
        return None if count is None or ceiling is None else count / ceiling / 1e9

    @property
    def limit_tokens_per_s(self) -> float | None:
        """What the limit allows."""
        return None if self.limit_ms is None else 1e3 * self.batch / self.limit_ms

    @property
    def limit_share(self) -> float | None:
        """limit_ms over ms: the part of the limit's speed that was reached."""
        return None if self.limit_ms is None or self.ms is None else self.limit_ms / self.ms

    @property
    def generate_limit_share(self) -> float | None:
        """As limit_share, of `generate`: its rows choose other experts than the chain's."""
        limit_ms = self._ms_to_read(self.generate_step_bytes)
        return None if limit_ms is None or not self.generate_ms else limit_ms / self.generate_ms

    @property
    def error(self) -> str | None:
        """What went wrong, if anything did."""
        return (self.notes or {}).get("error")

    def note(self, **notes: Any) -> None:
        """Adds to notes."""
        self.notes = {**(self.notes or {}), **notes}

    def take_bytes(self, read: StepBytes, unique_experts: float) -> None:
        """Fills in what a step has to read."""
        self.unique_experts = unique_experts
        self.step_bytes = read.total
        self.expert_bytes, self.cache_bytes = read.experts, read.cache


KINDS: Mapping[str, type] = {"decode": DecodeRow, "transformers": DecodeRow}


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a file of decode_speed.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    return records.read_record(path, KINDS)


def sorted_rows(rows: list[DecodeRow]) -> list[DecodeRow]:
    """By context and batch, each row of the model before its baseline's."""
    return sorted(rows, key=lambda row: (row.context, row.batch, row.kind, row.feed))


def beside(rows: list[DecodeRow], row: DecodeRow) -> DecodeRow | None:
    """The baseline's row at a row's batch and context, if it has a time."""
    for other in rows:
        same = (other.batch, other.context) == (row.batch, row.context)
        if same and other.kind == "transformers" and other.ms is not None:
            return other
    return None
