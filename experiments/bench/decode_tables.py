"""A record of decode_speed as tables: all of it for the console, the columns that count for a page.

A line is one batch and context; the baseline's figures stand beside the model's. What has no unit
in its title is tokens a second, experts a layer or a ratio.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.bench.decode_records import DecodeRow, beside, sorted_rows
from experiments.bench.records import Record
from experiments.bench.tables import markdown_line, runs_of

_NOTHING = "-"
_WIDTH = 150
_NOT_SHOWN = re.compile(r" --(commit|out)=\S+")


class _Column(NamedTuple):
    """A title, and a row's figure; `in_pages` where Markdown has it too."""

    title: str
    value: Callable[[DecodeRow, DecodeRow | None], float | None]
    text: Callable[[float], str]
    in_pages: bool = True


def _digits(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _times_faster(row: DecodeRow, other: DecodeRow | None) -> float | None:
    return None if other is None or row.ms is None else other.ms / row.ms


def _kernels(row: DecodeRow, other: DecodeRow | None) -> float | None:
    del other
    return None if row.kernels is None else sum(count for count, _ in row.kernels.values())


_COLUMNS = (
    _Column("limit, tok/s", lambda row, other: row.limit_tokens_per_s, _digits(0)),
    _Column("chain, tok/s", lambda row, other: row.tokens_per_s, _digits(0)),
    _Column("of the limit", lambda row, other: row.limit_share, _percent),
    _Column("chain, ms", lambda row, other: row.ms, _digits(3), in_pages=False),
    _Column("spread, ms", lambda row, other: row.ms_spread, _digits(3), in_pages=False),
    _Column("generate", lambda row, other: row.generate_tokens_per_s, _digits(0)),
    _Column("of its limit", lambda row, other: row.generate_limit_share, _percent),
    _Column("first, s", lambda row, other: row.first_token_s, _digits(3)),
    _Column("transformers", lambda row, other: other and other.tokens_per_s, _digits(0)),
    _Column("faster", _times_faster, _digits(2)),
    _Column("experts", lambda row, other: row.unique_experts, _digits(1)),
    _Column("generate's", lambda row, other: row.generate_experts, _digits(1)),
    _Column("read, GB", lambda row, other: row.step_bytes and row.step_bytes / 1e9, _digits(2)),
    _Column("kernels", _kernels, _digits(0), in_pages=False),
    _Column("compiled, s", lambda row, other: row.compile_s, _digits(1), in_pages=False),
    _Column(
        "program, GB",
        lambda row, other: row.program_bytes and row.program_bytes / 1e9,
        _digits(1),
        in_pages=False,
    ),
)


def table_of(
    rows: Sequence[DecodeRow], *, for_page: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Titles, and cells for each batch and context; columns without any figure are left out."""
    rows = sorted_rows(list(rows))
    lines = [(row, beside(rows, row)) for row in rows if row.kind == "decode"]
    taken = {(row.batch, row.context) for row, _ in lines}
    alone = [row for row in rows if (row.batch, row.context) not in taken]
    lines += [(_without_figures(row), beside(rows, row)) for row in alone]
    several = len({row.feed for row, _ in lines}) > 1
    titles, columns = ["batch", "context"], [[str(row.batch) for row, _ in lines]]
    columns.append([f"{row.context}" + f" {row.feed}" * several for row, _ in lines])
    for column in _COLUMNS:
        values = [column.value(row, other) for row, other in lines]
        if (for_page and not column.in_pages) or all(value is None for value in values):
            continue
        titles.append(column.title)
        columns.append([_NOTHING if v is None else column.text(v) for v in values])
    return titles, [list(cells) for cells in zip(*columns, strict=True)]


def _without_figures(row: DecodeRow) -> DecodeRow:
    """The model's row where the baseline alone ran."""
    return DecodeRow(
        run=row.run, kind="decode", batch=row.batch, context=row.context, steps=row.steps
    )


def kernel_lines(rows: Sequence[DecodeRow]) -> list[str]:
    """A line for each profiled row: its kernel classes, launches and us a step."""
    lines = []
    for row in sorted_rows(list(rows)):
        if row.kernels is not None:
            parts = [f"{name} {us:.1f} ({count:.0f})" for name, (count, us) in row.kernels.items()]
            total = sum(us for _, us in row.kernels.values())
            lines.append(
                f"Kernels of a step at batch {row.batch}, context {row.context}, us (launches): "
                f"{', '.join(parts)}; {total:.1f} in all."
            )
    return lines


def failures(rows: Sequence[DecodeRow]) -> list[str]:
    """A line for each row that failed."""
    return [
        f"{row.kind} at batch {row.batch}, context {row.context} failed: {row.error}"
        for row in sorted_rows(list(rows))
        if row.error
    ]


def print_record(console: Console, record: Record) -> None:
    """Prints the table, the kernels and what failed."""
    where = f"{record.preset}, {record.rows[0].run.device_kind}"
    table = Table(title=f"Decode steps: {where}", title_justify="left")
    titles, lines = table_of(record.rows)
    for title in titles:
        table.add_column(title, justify="right")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    for line in (*kernel_lines(record.rows), *failures(record.rows)):
        console.print(f"- {line}", highlight=False, markup=False)


def to_markdown(record: Record) -> str:
    """The table for a page, with what was measured where."""
    titles, lines = table_of(record.rows, for_page=True)
    made = [markdown_line(titles), markdown_line(["---:"] * len(titles))]
    made += map(markdown_line, lines)
    notes = [*kernel_lines(record.rows), *failures(record.rows)]
    made += ["", *(f"- {note}" for note in notes)] if notes else []
    # The commit is in the line before, and a page's lines are not endless.
    commands = dict.fromkeys(_NOT_SHOWN.sub("", row.run.command) for row in record.rows)
    made += ["", *runs_of(record.rows)]
    for command in commands:
        made += textwrap.wrap(f"Made by `{command}`.", _WIDTH, break_on_hyphens=False)
    return "\n".join(made)
