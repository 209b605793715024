"""What does a record of compare_layouts say? Prints it as Markdown and redraws its picture.

    python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl
    python -m experiments.render_results results/compare_layouts/h100_qwen3_30b_a3b.jsonl \
        --table=readme

The full table has a section a routing; --table=readme has the README's rows and columns.
"""

import dataclasses
import functools
import pathlib

from experiments.bench import plots, records, script, tables
from experiments.bench.script import argument, flag

TABLES = ("full", "readme")


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


def main(settings: Settings) -> None:
    """Prints the table of the file named on the command line.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no record, has no rows, or none of a routing.
    """
    path = settings.record
    record = records.read(path)
    if not record.rows:
        raise ValueError(f"{path} holds no measurement")
    elsewhere = records.measured_elsewhere(record.rows[0].run.device, record.preset)
    if settings.table == "readme":
        print(tables.to_readme(record, elsewhere))
    else:
        found = record.routings()
        for routing in settings.routing or found:
            if routing not in found:
                raise ValueError(f"--routing has {routing!r}; {path} has {', '.join(found)}")
        parts = [
            tables.to_markdown(record, routing, settings.metrics)
            for routing in settings.routing or found
        ]
        print("\n\n".join([*parts, *map(tables.elsewhere_line, elsewhere)]))
    if settings.plot:
        plots.draw(path.with_suffix(".png"), record, elsewhere)


run = functools.partial(script.run, Settings, main, one_line=(OSError, ValueError))

if __name__ == "__main__":
    run()
