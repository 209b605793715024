"""What does a record say? Prints it as Markdown and redraws its picture.

    python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl
    python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl \
        --table=readme
    python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl \
        --into=README.md,docs/benchmarks.md
    python -m experiments.render_results results/decode_speed/h100_qwen3_30b_a3b.jsonl \
        --into=docs/benchmarks.md

A record is of compare_layouts or of decode_speed. The first's full table has a section a routing,
and --table=readme has the README's rows and columns. With --into it replaces this record's tables
in pages, and prints none.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence

from experiments.bench import (
    decode_plots,
    decode_records,
    decode_tables,
    plots,
    records,
    script,
    tables,
)
from experiments.bench.script import argument, flag

TABLES = ("full", "readme")
README_RECORD = "h100_qwen3_30b_a3b"

_BLOCK = re.compile(
    r"(<!-- results:compare_layouts(?:/(?P<stem>\S+) (?P<routing>\S+) (?P<metrics>\S+))? -->\n)"
    r".*?(?=\n<!-- end of results:compare_layouts -->)",
    re.DOTALL,
)
_DECODE_BLOCK = re.compile(
    r"(<!-- results:decode_speed/(?P<stem>\S+) -->\n).*?(?=\n<!-- end of results:decode_speed -->)",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The argument and the flags."""

    record: pathlib.Path = argument("the JSONL file")
    table: str = flag("full", "Which table.", of=TABLES)
    metrics: tuple[str, ...] = flag(
        tables.METRICS, "The full table's sections.", of=tables.METRICS, needs="a metric"
    )
    routing: tuple[str, ...] = flag((), "The full table's routings, as in the file; empty: all.")
    plot: bool = flag(True, "Redraw the PNG beside the file.")
    into: tuple[pathlib.Path, ...] = flag(
        (), "Pages whose tables of this record are made anew, in place of printing."
    )


def with_tables(
    page: str, stem: str, record: records.Record, elsewhere: Sequence[records.Elsewhere]
) -> str:
    """A page's text with its tables of one record made anew.

    A table stands between two comments, or will stand there in place of an empty line. The first
    says which record, routing and sections; without them the table is the README's, of
    README_RECORD:

        <!-- results:compare_layouts/h100_qwen3_30b_a3b zipf chain_us,times_floor -->

        <!-- end of results:compare_layouts -->

    A record of decode_speed has one table:

        <!-- results:decode_speed/h100_qwen3_30b_a3b -->

        <!-- end of results:decode_speed -->

    Args:
      page: Markdown.
      stem: the record's file name, without its ending.
      record: what the tables show.
      elsewhere: other projects' figures, for the README and below a table of uniform routing.

    Raises:
      ValueError: the page has no table of this record, or one of a routing that the record has not.
    """

    def table(block: re.Match) -> str:
        if block["stem"] is None:
            return tables.to_readme(record, elsewhere)
        _check_routing(f"a page's table of {stem}", block["routing"], record)
        made = tables.to_markdown(record, block["routing"], block["metrics"].split(","))
        others = map(tables.elsewhere_line, elsewhere) if block["routing"] == "uniform" else ()
        return "\n\n".join([made, *others])

    is_decode = _is_decode(record)
    blocks = (_DECODE_BLOCK if is_decode else _BLOCK).finditer(page)
    ours = [block for block in blocks if (block["stem"] or README_RECORD) == stem]
    if not ours:
        raise ValueError(f"--into has a page without a table of {stem}")
    for block in reversed(ours):
        made = decode_tables.to_markdown(record) if is_decode else table(block)
        page = page[: block.start()] + block[1] + made + page[block.end() :]
    return page


def _is_decode(record: records.Record) -> bool:
    return isinstance(record.rows[0], decode_records.DecodeRow)


def _check_routing(what: str, routing: str, record: records.Record) -> None:
    if routing not in record.routings():
        raise ValueError(f"{what} has {routing!r}; it has {', '.join(record.routings())}")


def main(settings: Settings) -> None:
    """Prints the table of the file named on the command line, or writes it into pages.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no record, has no rows, or none of a routing; a page has no table of it.
    """
    path = settings.record
    record = records.read_record(path, {**records.KINDS, **decode_records.KINDS})
    if not record.rows:
        raise ValueError(f"{path} holds no measurement")
    elsewhere = records.measured_elsewhere(record.rows[0].run.device, record.preset)
    if settings.into:
        for page in settings.into:
            made = with_tables(page.read_text(), path.stem, record, elsewhere)
            page.write_text(made)
    elif _is_decode(record):
        print(decode_tables.to_markdown(record))
    elif settings.table == "readme":
        print(tables.to_readme(record, elsewhere))
    else:
        routings = settings.routing or record.routings()
        for routing in routings:
            _check_routing("--routing", routing, record)
        parts = [tables.to_markdown(record, routing, settings.metrics) for routing in routings]
        print("\n\n".join([*parts, *map(tables.elsewhere_line, elsewhere)]))
    if settings.plot and _is_decode(record):
        decode_plots.draw(path.with_suffix(".png"), record)
    elif settings.plot:
        plots.draw(path.with_suffix(".png"), record, elsewhere)


run = functools.partial(script.run, Settings, main, one_line=(OSError, ValueError))

if __name__ == "__main__":
    run()
