"""How far from the floor is each entry of a tuned table? Prints the table as Markdown.

    python -m experiments.render_tuned pallas_kernels/decode_experts/data/h100.json

A row's floor is the unique bytes of the very routings that its run drew, at that run's own read
ceiling, as in compare_layouts.
"""

import dataclasses
import functools
import pathlib

import jax

from experiments.bench import routings, script, timing
from experiments.bench.script import argument
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.tuned_tables import Entry, Table, parse

# What the kernels may take beyond the floor, by the largest T: launches, grouping and combine.
_ALLOWED_US = ((8, 7.0), (128, 10.0))
_COLUMNS = (
    "layer | weights | T | floor | auto | by | invariant | over the floor | times the floor | "
    "within | commit"
)
_ALIGNMENT = "--- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- | ---"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The argument."""

    table: pathlib.Path = argument("a tuned table's JSON file")


def main(settings: Settings) -> None:
    """Prints the table of the file.

    Raises:
      ValueError: the file is no table, or an entry has no floor; names the file.
      OSError: it cannot be read.
    """
    try:
        table = parse(settings.table.read_text(encoding="utf-8"), jax.__version__)
        print(table_to_markdown(table))
    except ValueError as error:  # a TableError, or text that is not UTF-8, is one
        raise ValueError(f"{settings.table}: {error}") from None


def entry_floor_us(entry: Entry, run: dict) -> float:
    """Microseconds to read the unique bytes of the routings that `run` timed the entry with.

    Raises:
      ValueError: the entry is of no preset, or the run does not say what it drew and read.
    """
    if _preset(entry) not in SHAPES:
        raise ValueError(f"of is {entry.of!r}; expected one of {sorted(SHAPES)}, or its shard")
    for field in ("routing", "seed", "read_ceiling_tbps"):
        if run.get(field) is None:
            raise ValueError(f"runs[{entry.run}].{field} is missing: no floor is known")
    # A shard of the first experts draws over all of them.
    whole = dataclasses.replace(entry.shapes, E=SHAPES[_preset(entry)].E)
    drawn = routings.make_routings(run["routing"], whole, entry.T, timing.STEPS, run["seed"])
    unique = routings.traffic(drawn, entry.shapes).unique_bytes
    return routings.floor_us(unique, run["read_ceiling_tbps"])


def _preset(entry: Entry) -> str:
    return entry.of.partition(",")[0]


def table_to_markdown(table: Table) -> str:
    """The table's entries in the order of the presets, shards behind their layers.

    Raises:
      ValueError: as entry_floor_us.
    """
    invariant = {(entry.shapes, entry.T): entry for entry in table.invariant}
    order = {name: index for index, name in enumerate(SHAPES)}
    ordered = sorted(
        table.fastest,
        key=lambda e: (order.get(_preset(e), -1), e.of, e.shapes.weights, e.T),
    )
    lines = [f"| {_COLUMNS} |", f"| {_ALIGNMENT} |"]
    for entry in ordered:
        run = table.runs[entry.run]
        floor = entry_floor_us(entry, run)
        allowed = next(us for most, us in _ALLOWED_US if most >= entry.T)
        over = entry.us - floor
        same_bits = invariant.get((entry.shapes, entry.T))
        cells = [
            entry.of,
            entry.shapes.weights,
            f"{entry.T}",
            f"{floor:.1f}",
            f"{entry.us:.1f}",
            entry.layout,
            f"{same_bits.us:.1f}" if same_bits else "-",
            f"{over:.1f}",
            f"{entry.us / floor:.2f}",
            "yes" if over <= allowed else "no",
            run.get("commit", "-")[:7],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


run = functools.partial(script.run, Settings, main, one_line=(OSError, ValueError))

if __name__ == "__main__":
    run()
