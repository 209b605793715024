"""A record as tables: for the console, for the README, for docs/benchmarks.md.

A table has one section a metric, one row a candidate and one column a number of tokens.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.bench.accuracy import REPEATS
from experiments.bench.records import Elsewhere, Record, Row

_NOTHING = "-"
README_TOKENS = (1, 8, 64, 128)
BEST_XLA = "best plain XLA"


class Section(NamedTuple):
    """A metric: its title, and (candidate, cells), a cell for each number of tokens."""

    title: str
    rows: list[tuple[str, list[str]]]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def microseconds(value: float) -> str:
    """As every table writes it."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _error(value: float) -> str:
    return f"{value:.2e}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "NO"


# Name on the command line -> title, field, how a figure is written.
_METRICS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "chain_us": ("chain, us", "chain_us", microseconds),
    "times_floor": ("times the floor", "times_floor", _number(2)),
    "chain_us_spread": ("chain spread, us", "chain_us_spread", microseconds),
    "device_us": ("device, us", "device_us", microseconds),
    "unique_tbps": ("unique-byte TB/s", "unique_tbps", _number(2)),
    "requested_tbps": ("requested-byte TB/s", "requested_tbps", _number(2)),
    "ceiling_share": ("share of the read ceiling", "ceiling_share", _percent),
    "rel_error": ("relative error", "rel_error", _error),
    "rel_error_before_rounding": (
        "relative error before rounding",
        "rel_error_before_rounding",
        _error,
    ),
    "max_error": ("max error", "max_error", _error),
    "same_bits_repeated": (f"same bits in {REPEATS} repeats", "same_bits_repeated", _yes_no),
    "same_bits_alone": ("a token's bits the same in any batch", "same_bits_alone", _yes_no),
}
METRICS = tuple(_METRICS)


def sections(rows: Sequence[Row], metrics: Iterable[str] = METRICS) -> list[Section]:
    """The sections that have a figure in them, for rows of one routing."""
    tokens = tokens_of(rows)
    names = list(dict.fromkeys(row.name for row in rows))
    at = {(row.name, row.tokens): row for row in rows}
    built = []
    for metric in metrics:
        title, field, text = _METRICS[metric]
        values = {key: getattr(row, field) for key, row in at.items()}
        values = {key: value for key, value in values.items() if value is not None}
        lines = []
        for name in names:
            cells = [
                text(values[name, T])
                if (name, T) in values
                else _why_missing(at.get((name, T)), metric)
                for T in tokens
            ]
            if any(cell != _NOTHING for cell in cells):
                lines.append((name, cells))
        if metric == "chain_us" and (floors := floor_at(rows)):
            cells = [microseconds(floors[T]) if T in floors else _NOTHING for T in tokens]
            lines.insert(0, ("floor: unique bytes", cells))
        if values:
            built.append(Section(title, lines))
    return built


def tokens_of(rows: Sequence[Row]) -> list[int]:
    """The numbers of tokens, in order."""
    return sorted({row.tokens for row in rows})


def _why_missing(row: Row | None, metric: str) -> str:
    """In the sections that a candidate ought to be in, a word instead of a figure."""
    config = (row.config if row else None) or {}
    if metric == "chain_us" and "skipped" in config:
        return "skipped"
    if metric in ("chain_us", "rel_error") and "error" in config:
        return "failed"
    return _NOTHING


def floor_at(rows: Sequence[Row]) -> dict[int, float]:
    """The floor at each T that has one; the earliest row's, where runs differ."""
    floors: dict[int, float] = {}
    for row in rows:
        if row.floor_us is not None:
            floors.setdefault(row.tokens, row.floor_us)
    return floors


def best_baseline(rows: Sequence[Row]) -> dict[int, Row]:
    """The fastest of plain XLA at each T at which one was timed."""
    return _fastest(row for row in rows if row.name.startswith("xla_"))


def fastest_layouts(rows: Sequence[Row]) -> dict[int, Row]:
    """The fastest layout or mode at each T at which one was timed."""
    return _fastest(row for row in rows if row.kind == "layout")


def _fastest(rows: Iterable[Row]) -> dict[int, Row]:
    fastest: dict[int, Row] = {}
    for row in rows:
        if row.chain_us is not None:
            held = fastest.get(row.tokens)
            if held is None or row.chain_us < held.chain_us:
                fastest[row.tokens] = row
    return dict(sorted(fastest.items()))


class Crossover(NamedTuple):
    """Between two timed token counts, the fastest layout changes."""

    below: int
    above: int
    before: str
    after: str


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """Where one layout overtakes another, in order of T."""
    return [
        Crossover(T, next_T, row.layout, next_row.layout)
        for (T, row), (next_T, next_row) in itertools.pairwise(fastest_layouts(rows).items())
        if row.layout != next_row.layout
    ]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the figures say in words: crossovers, distance from the floor, what failed or is odd."""
    found, fastest = crossovers(rows), fastest_layouts(rows)
    lines = [
        f"{c.before} is the fastest layout up to T = {c.below}, {c.after} from T = {c.above} on."
        for c in found
    ]
    chosen: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if row.kind == "layout" and row.layout != row.name:
            chosen.setdefault(row.name, {}).setdefault(row.layout, []).append(row.tokens)
    for mode, by_layout in chosen.items():
        taken = [f"{name} at T = {', '.join(map(str, Ts))}" for name, Ts in by_layout.items()]
        lines.append(f"{mode} takes {'; '.join(taken)}.")
    layouts = {row.layout for row in rows if row.kind == "layout"}
    if fastest and not found and len(layouts) > 1:
        name = next(iter(fastest.values())).layout
        lines.append(f"{name} is the fastest layout at every T measured: no crossover.")
    shares = [f"{row.times_floor:.2f} at T = {T}" for T, row in fastest.items() if row.times_floor]
    if shares:
        lines.append("Fastest layout over the floor: " + ", ".join(shares) + ".")
    best = best_baseline(rows)
    gains = [
        f"{best[T].chain_us / row.chain_us:.1f} at T = {T}"
        for T, row in fastest.items()
        if T in best
    ]
    if gains:
        lines.append("Times faster than the best of plain XLA: " + ", ".join(gains) + ".")
    seen: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        config = row.config or {}
        for key in ("error", "skipped", "dense_expansion", "warning", "device_us_error"):
            if config.get(key):
                seen.setdefault((row.name, _in_words(key, config)), []).append(row.tokens)
    for (name, words), tokens in seen.items():
        lines.append(f"{name} {words} (T = {', '.join(map(str, tokens))})")
    return lines


def _in_words(key: str, config: dict) -> str:
    if key == "dense_expansion":
        return "is expanded by XLA to a dense product over all experts"
    return f"{key.replace('_', ' ')}: {str(config[key])[:300]}"


def print_record(console: Console, record: Record, dtype: str = "bf16") -> None:
    """Prints a table and remarks for each routing."""
    for routing in record.routings():
        rows = record.of(routing, dtype)
        if not rows:
            continue
        where = f"{record.preset}, {routing} routing, {dtype} output, {rows[0].run.device_kind}"
        table = Table(title=where, title_justify="left")
        table.add_column("")
        for T in tokens_of(rows):
            table.add_column(f"T={T}", justify="right")
        for section in sections(rows):
            table.add_row(f"[bold]{section.title}[/bold]")
            for index, (name, cells) in enumerate(section.rows):
                table.add_row(f"  {name}", *cells, end_section=index == len(section.rows) - 1)
        console.print(table)
        for line in remarks(rows):
            console.print(f"- {line}", highlight=False, markup=False)


def to_markdown(
    record: Record, routing: str, metrics: Iterable[str] = METRICS, dtype: str = "bf16"
) -> str:
    """One routing's table and remarks as Markdown, for docs/benchmarks.md."""
    rows = record.of(routing, dtype)
    tokens = tokens_of(rows)
    lines = [markdown_line(["", f"T = {tokens[0]}", *map(str, tokens[1:])])]
    lines.append(markdown_line(["---", *["---:"] * len(tokens)]))
    for section in sections(rows, metrics):
        lines.append(markdown_line([f"**{section.title}**", *[""] * len(tokens)]))
        lines.extend(markdown_line([name, *cells]) for name, cells in section.rows)
    lines += ["", *(f"- {line}" for line in remarks(rows)), "", *runs_of(rows)]
    commands = dict.fromkeys(row.run.command for row in rows)
    lines += ["", *(f"Made by `{command}`." for command in commands)]
    return "\n".join(lines)


def layout_rows(rows: Sequence[Row], layout: str) -> dict[int, Row]:
    """For each T the row of a layout: of the latest run, and there the one of its own name.

    A mode's row is the layout's too where it took that one, with the tuned table's config.
    """
    found: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: (row.tokens, row.run.date, row.name == layout)):
        if row.kind == "layout" and row.layout == layout and row.chain_us is not None:
            found[row.tokens] = row
    return found


def to_readme(record: Record, elsewhere: Sequence[Elsewhere]) -> str:
    """The README's table: floor, both layouts, vLLM's figures, the best of XLA, the error."""
    rows = record.of()
    ours = {name: layout_rows(rows, name) for name in ("output_major", "expert_major")}
    best, floors = best_baseline(rows), floor_at(rows)
    [*vllm] = (other for other in elsewhere if other.name == "vllm")
    theirs = dict(zip(vllm[0].tokens, vllm[0].us, strict=True)) if vllm else {}
    lines = [
        markdown_line(["T", "floor", *ours, "vLLM 0.33 *", BEST_XLA, "error"]),
        markdown_line(["---:"] * 7),
    ]
    used: list[Row] = []
    for T in README_TOKENS:
        taken = [found.get(T) for found in ours.values()]
        timed = [row for row in taken if row is not None]
        fastest = min(timed, key=lambda row: row.chain_us, default=None)
        cells = [str(T), _or_nothing(floors.get(T))]
        for row in taken:
            cell = _or_nothing(row and row.chain_us)
            cells.append(f"**{cell}**" if row is not None and row is fastest else cell)
        cells += [_or_nothing(theirs.get(T)), _or_nothing(best[T].chain_us if T in best else None)]
        errors = [row.rel_error for row in timed if row.rel_error is not None]
        cells.append(f"{1e3 * max(errors):.2f}e-3" if errors else _NOTHING)
        lines.append(markdown_line(cells))
        used += [*timed, *([best[T]] if T in best else [])]
    lines += ["", *runs_of(used)]
    for other in vllm:
        least_and_largest = " to ".join(f"{1e3 * error:.1f}e-3" for error in other.rel_errors)
        error = f"; its error is {least_and_largest}" if other.rel_errors else ""
        lines.append(
            "\\* Measured elsewhere, on a card of the same kind, its grouping of tokens left out"
            f"{error}."
        )
    return "\n".join(lines)


def elsewhere_line(other: Elsewhere) -> str:
    """All figures of one row of the data table, with their source."""
    us = " / ".join(map(microseconds, other.us))
    tokens = ", ".join(map(str, other.tokens))
    beside = " / ".join(map(microseconds, other.beside_us))
    return (
        f"- {other.name}, measured elsewhere: {us} us at T = {tokens}"
        + (f"; these kernels beside it {beside}" if beside else "")
        + f". {other.source}."
    )


def _or_nothing(us: float | None) -> str:
    return _NOTHING if us is None else microseconds(us)


def runs_of(rows: Sequence[Any]) -> list[str]:
    """A line for each run of the rows; where there are several, with the rows' names."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(str(row.run), []).append(row)
    lines = []
    for of_run in runs.values():
        run = of_run[0].run
        names = ", ".join(dict.fromkeys(row.name for row in of_run))
        ceiling = run.read_ceiling_tbps
        lines.append(
            ("" if len(runs) == 1 else f"{names}: ")
            + f"{run.device_kind}, jax {run.jax}, commit {(run.commit or 'unknown')[:7]}, "
            + f"{run.date[:10]}."
            + ("" if ceiling is None else f" Read ceiling {ceiling:.2f} TB/s.")
        )
    return lines


def markdown_line(cells: Iterable[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"
