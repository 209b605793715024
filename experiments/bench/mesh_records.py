"""The rows of decode_on_mesh: a decode step on one device or on a mesh, timed at one batch.

    {"kind": "mesh", "run": 0, "mesh": "expert=2", "batch": 32, "context": 512, "ms": 6.4, ...}

The file around them is that of records.py.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.bench import records
from experiments.bench.environment import Environment
from moe_jax.decode_step import LAYERS_BACKENDS

ONE = "one"  # device, without a mesh
BOUND = LAYERS_BACKENDS["blocks"].rel_error["bfloat16"]


@dataclasses.dataclass(kw_only=True)
class MeshRow:
    """One mesh, batch and context; None where a figure was not taken.

    Attributes:
      run: where and how it was measured.
      kind: "mesh".
      mesh: axes and sizes, as in "expert=2"; ONE for one device.
      batch: rows in the batch.
      context: tokens that each row's cache holds before the first step.
      steps: of a program that is issued at once.
      devices: how many.
      ms, ms_spread: a step's time in a chain, the median over repeats, and between its quartiles.
      host_bound: whether the host took as long to issue the steps.
      compile_s: seconds to trace, lower and compile the program, if by itself.
      program_bytes: the program's arguments, results and temporaries on one device.
      backends: what computed each op.
      logits_error: the median over rows of ||y - one device's|| / ||one device's||, of the logits
        of the last step.
      blocks_error: the same of one device's blocks, where one device takes the kernels: what
        rounding makes of these weights and tokens.
      same_experts, same_tokens: the part of the experts and of the greedy choices that is equal.
      error: what went wrong, if anything did.
    """

    run: Environment
    kind: str = "mesh"
    mesh: str
    batch: int
    context: int
    steps: int
    devices: int
    ms: float | None = None
    ms_spread: float | None = None
    host_bound: bool | None = None
    compile_s: float | None = None
    program_bytes: int | None = None
    backends: dict[str, str] | None = None
    logits_error: float | None = None
    blocks_error: float | None = None
    same_experts: float | None = None
    same_tokens: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.mesh, self.batch, self.context

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows of the batch."""
        return None if self.ms is None else 1e3 * self.batch / self.ms

    @property
    def within_rounding(self) -> bool | None:
        """Whether the logits are no further off than twice what rounding explains.

        They always may be off by what the backends of all layers declare for bfloat16.
        """
        if self.logits_error is None or self.blocks_error is None:
            return None
        return self.logits_error <= max(2 * self.blocks_error, BOUND)

    @property
    def said(self) -> str:
        """The row in a line."""
        if self.error is not None:
            return f"FAILED: {self.error}"
        said = f"{self.ms:.3f} ms a step, {self.tokens_per_s:.0f} tok/s"
        if self.compile_s is not None:
            said += f", compiled in {self.compile_s:.1f} s"
        said += ", host-bound" * bool(self.host_bound)
        if self.logits_error is not None:
            said += (
                f"; logits off by {self.logits_error:.4f}, rounding explains "
                f"{self.blocks_error:.4f}; {100 * self.same_experts:.1f}% of the experts and "
                f"{100 * self.same_tokens:.1f}% of the tokens are one device's"
            )
        return said


KINDS: Mapping[str, type] = {"mesh": MeshRow}


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a file of decode_on_mesh.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    return records.read_record(path, KINDS)


def table_of(rows: Sequence[MeshRow]) -> Table:
    """A line a row, its speed beside that of one device at the same batch and context."""
    table = Table(title="Decode steps on meshes", title_justify="left")
    for title in (
        "mesh", "batch", "context", "ms", "spread", "tok/s", "times one", "layers by", "experts by",
        "logits off", "by rounding", "same experts", "same tokens", "compiled, s",
    ):  # fmt: skip
        table.add_column(title, justify="left" if title == "mesh" else "right")
    alone = {(row.batch, row.context): row.ms for row in rows if row.mesh == ONE}
    for row in sorted(rows, key=lambda row: (row.context, row.batch, row.mesh != ONE, row.mesh)):
        one, backends = alone.get((row.batch, row.context)), row.backends or {}
        table.add_row(
            row.mesh,
            str(row.batch),
            str(row.context),
            _shown(row.ms, 3) + " host" * bool(row.host_bound),
            _shown(row.ms_spread, 3),
            _shown(row.tokens_per_s, 0),
            _shown(one / row.ms if one and row.ms else None, 2),
            backends.get("layers", "-"),
            backends.get("experts", "-"),
            _shown(row.logits_error, 4),
            _shown(row.blocks_error, 4),
            _shown(row.same_experts, 3),
            _shown(row.same_tokens, 3),
            _shown(row.compile_s, 1),
        )
    return table


def _shown(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def problems(rows: Iterable[MeshRow]) -> list[str]:
    """A line for each row that failed, or is off by more than rounding."""
    found = []
    for row in rows:
        where = f"{row.mesh}, batch {row.batch}, context {row.context}"
        if row.error:
            found.append(f"{where} failed: {row.error}")
        if row.within_rounding is False:
            found.append(
                f"{where}: logits are off by {row.logits_error:.4f}, and rounding explains "
                f"{row.blocks_error:.4f}"
            )
    return found
