"""The picture of a record of decode_speed: tokens a second and share of the limit, by batch."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench.decode_records import DecodeRow, beside, sorted_rows
from experiments.bench.plots import finish_axis
from experiments.bench.records import Record

_CHAIN, _GENERATE, _OTHER = "#d1495b", "#0b6e99", "#6b6b6b"
_LIMIT = {"color": "black", "linestyle": "--", "linewidth": 1.2}
_MEASURED = {"marker": "o", "markersize": 4.5, "linewidth": 1.8}

_Figure = Callable[[DecodeRow, DecodeRow | None], float | None]


class _Line(NamedTuple):
    """A colour, milliseconds a step, and what part of its limit that is."""

    colour: str
    ms: _Figure
    share: _Figure


# What the baseline's rows read is not counted: it is given the chain's tokens.
_LINES: Mapping[str, _Line] = {
    "chain": _Line(_CHAIN, lambda row, other: row.ms, lambda row, other: row.limit_share),
    "generate": _Line(
        _GENERATE, lambda row, other: row.generate_ms, lambda row, other: row.generate_limit_share
    ),
    "transformers, compiled": _Line(
        _OTHER,
        lambda row, other: other and other.ms,
        lambda row, other: row.limit_ms / other.ms if other and row.limit_ms else None,
    ),
}


def draw(path: pathlib.Path, record: Record) -> None:
    """Writes the PNG; nothing if no row has a time."""
    figure = figure_of(record.preset, record.rows)
    if figure is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, pil_kwargs={"optimize": True})


def figure_of(preset: str, rows: Sequence[DecodeRow]) -> Figure | None:
    """The picture, which a notebook can show; None if no row has a time."""
    timed = [row for row in sorted_rows(list(rows)) if row.kind == "decode" and row.ms is not None]
    if not timed:
        return None
    others = {row.key: beside(list(rows), row) for row in timed}
    first = [row for row in timed if row.context == timed[0].context]
    panels: list[Callable[[Axes], None]] = [lambda ax: _draw_speed(ax, first, others)]
    if any(row.limit_share is not None for row in first):
        panels.append(lambda ax: _draw_share(ax, first, others))
    if several := _of_several_contexts(timed):
        panels.append(lambda ax: _draw_contexts(ax, several))
    figure = Figure(figsize=(4.9 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax)
        ax.legend(frameon=False, fontsize=8)
    run = timed[0].run
    ceiling = run.read_ceiling_tbps
    figure.suptitle(
        f"Decode steps of {preset}, {run.device_kind}"
        + (f", read ceiling {ceiling:.2f} TB/s" if ceiling is not None else ""),
        fontsize=12,
    )
    return figure


def _draw_speed(ax: Axes, rows: Sequence[DecodeRow], others: Mapping) -> None:
    limits = {row.batch: row.limit_tokens_per_s for row in rows if row.limit_ms is not None}
    if limits:
        ax.plot(limits.keys(), limits.values(), label="limit: bytes at the ceiling", **_LIMIT)
    for label, line in _LINES.items():
        points = {row.batch: line.ms(row, others[row.key]) for row in rows}
        points = {B: 1e3 * B / taken for B, taken in points.items() if taken is not None}
        _plot(ax, label, line, points)
    finish_axis(ax, "rows in the batch")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    ax.set_title(f"tokens a second, context {rows[0].context}", fontsize=10, loc="left")


def _draw_share(ax: Axes, rows: Sequence[DecodeRow], others: Mapping) -> None:
    for label, line in _LINES.items():
        points = {row.batch: line.share(row, others[row.key]) for row in rows}
        points = {B: 100 * share for B, share in points.items() if share is not None}
        _plot(ax, label, line, points)
    finish_axis(ax, "rows in the batch")
    ax.set_ylim(0, 100)
    ax.set_title(f"share of the limit, %, context {rows[0].context}", fontsize=10, loc="left")


def _plot(ax: Axes, label: str, line: _Line, points: Mapping[int, float]) -> None:
    if points:
        ax.plot(points.keys(), points.values(), color=line.colour, label=label, **_MEASURED)


def _of_several_contexts(rows: Sequence[DecodeRow]) -> dict[int, list[DecodeRow]]:
    """The rows of each batch that was timed at more than one context."""
    batches: dict[int, list[DecodeRow]] = {}
    for row in rows:
        batches.setdefault(row.batch, []).append(row)
    return {B: own for B, own in batches.items() if len({row.context for row in own}) > 1}


def _draw_contexts(ax: Axes, batches: Mapping[int, Sequence[DecodeRow]]) -> None:
    colours = (_CHAIN, _GENERATE, "#b08a3e", _OTHER)
    for index, (B, rows) in enumerate(batches.items()):
        colour = colours[index % len(colours)]
        times = {row.context: row.ms for row in rows}
        ax.plot(times.keys(), times.values(), color=colour, label=f"batch {B}", **_MEASURED)
        limits = {row.context: row.limit_ms for row in rows if row.limit_ms is not None}
        if limits:
            style = _LIMIT | {"color": colour}
            ax.plot(limits.keys(), limits.values(), label=f"batch {B}, limit", **style)
    finish_axis(ax, "context, tokens")
    ax.set_ylim(bottom=0)
    ax.set_title("milliseconds a step, by context", fontsize=10, loc="left")
