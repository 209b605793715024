"""The result table: one section a metric, one row a candidate, one column a number of tokens."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.compare.byte_model import floor_us
from experiments.compare.records import Environment, Measurement
from experiments.compare.same_bits import REPEATS

_NOTHING = "-"


class Section(NamedTuple):
    """A metric: its title, and (candidate, cells), a cell for each number of tokens."""

    title: str
    rows: list[tuple[str, list[str]]]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _error(value: float) -> str:
    return f"{value:.2e}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "NO"


# Name on the command line -> title, field, how a figure is written.
_METRICS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "chain_us": ("chain, us", "chain_us", _microseconds),
    "chain_us_spread": ("chain spread, us", "chain_us_spread", _microseconds),
    "device_us": ("device, us", "device_us", _microseconds),
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
_SPEEDUP = "speedup"
METRICS = (*_METRICS, _SPEEDUP)


def sections(
    environment: Environment, measurements: Sequence[Measurement], metrics: Iterable[str] = METRICS
) -> tuple[list[int], list[Section]]:
    """The token counts, and the sections that have a figure in them."""
    tokens = sorted({m.tokens for m in measurements})
    names = list(dict.fromkeys(m.name for m in measurements))
    at = {(m.name, m.tokens): m for m in measurements}
    best = {T: best_baseline_us(measurements, T) for T in tokens}
    built = []
    for metric in metrics:
        if metric == _SPEEDUP:
            title = "times faster than the best baseline"
            values = {
                key: best[key[1]] / m.chain_us
                for key, m in at.items()
                if m.kind == "layout" and m.chain_us and best[key[1]]
            }
            text = _number(2)
        else:
            title, field, text = _METRICS[metric]
            values = {key: getattr(m, field) for key, m in at.items()}
            values = {key: value for key, value in values.items() if value is not None}
        rows = []
        for name in names:
            cells = [
                text(values[name, T])
                if (name, T) in values
                else _why_missing(at.get((name, T)), metric)
                for T in tokens
            ]
            if any(cell != _NOTHING for cell in cells):
                rows.append((name, cells))
        if metric == "chain_us" and (floors := _floors(environment, measurements, tokens)):
            rows.insert(0, ("floor: unique bytes", floors))
        if values:
            built.append(Section(title, rows))
    return tokens, built


def _why_missing(measurement: Measurement | None, metric: str) -> str:
    """In the sections that a candidate ought to be in, a word instead of a figure."""
    config = (measurement.config if measurement else None) or {}
    if metric == "chain_us" and "skipped" in config:
        return "skipped"
    if metric in ("chain_us", "rel_error") and "error" in config:
        return "failed"
    return _NOTHING


def _floors(
    environment: Environment, measurements: Sequence[Measurement], tokens: Sequence[int]
) -> list[str]:
    floors = floor_at(environment, measurements)
    return [_microseconds(floors[T]) if T in floors else _NOTHING for T in tokens] if floors else []


def floor_at(environment: Environment, measurements: Sequence[Measurement]) -> dict[int, float]:
    """Microseconds to read the unique bytes at the run's read ceiling, for each T that has both."""
    ceiling = environment.read_ceiling_tbps
    if ceiling is None:
        return {}
    return {
        m.tokens: floor_us(m.unique_bytes, ceiling)
        for m in measurements
        if m.unique_bytes is not None
    }


def best_baseline_us(measurements: Sequence[Measurement], T: int) -> float | None:
    """The fastest baseline's chain time at T tokens."""
    times = [
        m.chain_us
        for m in measurements
        if m.kind == "baseline" and m.tokens == T and m.chain_us is not None
    ]
    return min(times, default=None)


def fastest_layouts(measurements: Sequence[Measurement]) -> dict[int, Measurement]:
    """The fastest layout at each T at which a layout was timed."""
    fastest: dict[int, Measurement] = {}
    for m in measurements:
        if m.kind == "layout" and m.chain_us is not None:
            held = fastest.get(m.tokens)
            if held is None or m.chain_us < held.chain_us:
                fastest[m.tokens] = m
    return dict(sorted(fastest.items()))


class Crossover(NamedTuple):
    """Between two timed token counts, the fastest layout changes."""

    below: int
    above: int
    before: str
    after: str


def crossovers(measurements: Sequence[Measurement]) -> list[Crossover]:
    """Where one layout overtakes another, in order of T."""
    fastest = list(fastest_layouts(measurements).items())
    return [
        Crossover(T, next_T, layout_of(m), layout_of(next_m))
        for (T, m), (next_T, next_m) in itertools.pairwise(fastest)
        if layout_of(m) != layout_of(next_m)
    ]


def layout_of(m: Measurement) -> str:
    """The layout that ran; where a mode was asked for, what it chose."""
    return (m.config or {}).get("layout", m.name)


def remarks(environment: Environment, measurements: Sequence[Measurement]) -> list[str]:
    """What the figures say in words: crossovers, distance from the floor, what failed or is odd."""
    lines = []
    found = crossovers(measurements)
    for c in found:
        lines.append(
            f"{c.before} is the fastest layout up to T = {c.below}, "
            f"{c.after} from T = {c.above} on."
        )
    chosen: dict[str, dict[str, list[int]]] = {}
    for m in measurements:
        if m.kind == "layout" and layout_of(m) != m.name:
            chosen.setdefault(m.name, {}).setdefault(layout_of(m), []).append(m.tokens)
    for mode, by_layout in chosen.items():
        taken = [f"{name} at T = {', '.join(map(str, Ts))}" for name, Ts in by_layout.items()]
        lines.append(f"{mode} takes {'; '.join(taken)}.")
    fastest = fastest_layouts(measurements)
    if (
        fastest
        and not found
        and len({layout_of(m) for m in measurements if m.kind == "layout"}) > 1
    ):
        name = layout_of(next(iter(fastest.values())))
        lines.append(f"{name} is the fastest layout at every T measured: no crossover.")
    floors = floor_at(environment, measurements)
    if fastest and floors:
        shares = [
            f"{m.chain_us / floors[T]:.2f} at T = {T}" for T, m in fastest.items() if T in floors
        ]
        lines.append("Fastest layout over the floor: " + ", ".join(shares) + ".")
    seen: dict[tuple[str, str], list[int]] = {}
    for m in measurements:
        config = m.config or {}
        for key in ("error", "skipped", "dense_expansion", "warning", "device_us_error"):
            if config.get(key):
                seen.setdefault((m.name, _in_words(key, config)), []).append(m.tokens)
    for (name, words), tokens in seen.items():
        lines.append(f"{name} {words} (T = {', '.join(map(str, tokens))})")
    return lines


def _in_words(key: str, config: dict) -> str:
    if key == "dense_expansion":
        return "is expanded by XLA to a dense product over all experts"
    return f"{key.replace('_', ' ')}: {str(config[key])[:300]}"


def print_table(
    console: Console, environment: Environment, measurements: Sequence[Measurement]
) -> None:
    """Prints the sections as one table, and the remarks below it."""
    tokens, built = sections(environment, measurements)
    first = measurements[0]
    table = Table(
        title=f"{first.preset}, {first.routing} routing, {first.dtype} output, "
        f"{environment.device_kind}",
        title_justify="left",
    )
    table.add_column("")
    for T in tokens:
        table.add_column(f"T={T}", justify="right")
    for section in built:
        table.add_row(f"[bold]{section.title}[/bold]")
        for index, (name, cells) in enumerate(section.rows):
            table.add_row(f"  {name}", *cells, end_section=index == len(section.rows) - 1)
    console.print(table)
    for line in remarks(environment, measurements):
        console.print(f"- {line}", highlight=False, markup=False)


def to_markdown(
    environment: Environment, measurements: Sequence[Measurement], metrics: Iterable[str] = METRICS
) -> str:
    """The same table and remarks as Markdown, for the README."""
    tokens, built = sections(environment, measurements, metrics)
    header = ["", "T = " + str(tokens[0]), *map(str, tokens[1:])]
    lines = [_row(header), _row(["---", *["---:"] * len(tokens)])]
    for section in built:
        lines.append(_row([f"**{section.title}**", *[""] * len(tokens)]))
        lines.extend(_row([name, *cells]) for name, cells in section.rows)
    ceiling = environment.read_ceiling_tbps
    measured = "" if ceiling is None else f" Read ceiling {ceiling:.2f} TB/s."
    lines += [
        "",
        f"{environment.device_kind}, {measurements[0].preset}, {measurements[0].routing} routing, "
        f"jax {environment.jax}, commit {(environment.commit or 'unknown')[:12]}, "
        f"{environment.date[:10]}.{measured}",
        "",
        f"Made by `{environment.command}`.",
        "",
        *(f"- {line}" for line in remarks(environment, measurements)),
    ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
