"""The picture of a record: time over the floor, bandwidth and error against tokens."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.bench.accuracy import BF16_ROUNDING
from experiments.bench.records import Elsewhere, Record, Row
from experiments.bench.tables import (
    BEST_XLA,
    best_baseline,
    crossovers,
    floor_at,
    layout_rows,
)

LAYOUT_COLOURS = {"output_major": "#0b6e99", "expert_major": "#d1495b"}
# Two layouts often lie on one another: the first is drawn broad, the second narrower on top.
_WIDTHS = ((3.6, 7.0), (1.8, 4.5))
_XLA, _VLLM, _GREY = "#b08a3e", "#6b6b6b", "#666666"
# The ratio's axis ends here: a line that goes beyond says so at the edge.
_LARGEST_RATIO = 3.2
_BEYOND = {"weight": "bold", "size": 8, "ha": "left", "va": "top"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    """A candidate's values over T, and how they are drawn."""

    label: str
    colour: str
    points: dict[int, float]
    style: dict


def draw(path: pathlib.Path, record: Record, elsewhere: Sequence[Elsewhere] = ()) -> None:
    """Writes the PNG of the uniform routing's rows; nothing if none of them has figures.

    A record without that routing shows its first one. A panel that has no figures on this device is
    left out.
    """
    rows = record.of() or record.of(record.rows[0].routing, record.rows[0].dtype)
    figure = figure_of(record.preset, rows, elsewhere)
    if figure is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, pil_kwargs={"optimize": True})


def figure_of(
    preset: str, rows: Sequence[Row], elsewhere: Sequence[Elsewhere] = ()
) -> Figure | None:
    """The picture, which a notebook can show; None if no row has figures.

    Made without pyplot, because importing that would choose a backend for the whole process.
    """
    timed = any(row.times_floor is not None for row in rows)
    panels = [
        (_draw_time, timed),
        (_draw_bandwidth, timed),
        (_draw_error, any(row.rel_error is not None for row in rows)),
    ]
    panels = [panel for panel, has_figures in panels if has_figures]
    if not panels:
        return None
    figure = Figure(figsize=(4.9 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    handles: dict[str, object] = {}
    for ax, panel in zip(axes[0], panels, strict=True):
        panel(ax, rows, elsewhere)
        finish_axis(ax)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    figure.suptitle(
        f"One MoE layer's experts at decode: {preset}, {rows[0].dtype} output, "
        f"{rows[0].routing} routing, {rows[0].run.device_kind}",
        fontsize=12,
    )
    return figure


def _lines(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[_Line]:
    """Both layouts, the best of XLA, and other projects' kernels that ran beside them."""

    def points(own: Sequence[Row]) -> dict[int, float]:
        found = {row.tokens: value(row) for row in sorted(own, key=lambda row: row.tokens)}
        return {T: figure for T, figure in found.items() if figure is not None}

    lines = [
        _Line(
            label=name,
            colour=colour,
            points=points(list(layout_rows(rows, name).values())),
            style={"marker": "o", "markersize": marker, "linewidth": width, "zorder": 4},
        )
        for (name, colour), (width, marker) in zip(LAYOUT_COLOURS.items(), _WIDTHS, strict=True)
    ]
    thin = {"marker": "s", "markersize": 3.5, "linewidth": 1.3, "zorder": 3}
    best = list(best_baseline(rows).values())
    lines.append(_Line(label=BEST_XLA, colour=_XLA, points=points(best), style=thin))
    for name in ("vllm", "tokamax"):
        own = [row for row in rows if row.name == name]
        lines.append(_Line(label=f"{name}, this run", colour=_VLLM, points=points(own), style=thin))
    return [line for line in lines if line.points]


def _plot(ax: Axes, line: _Line) -> None:
    ax.plot(
        line.points.keys(), line.points.values(), color=line.colour, label=line.label, **line.style
    )


def _elsewhere_line(other: Elsewhere, points: dict[int, float]) -> _Line:
    return _Line(
        label=f"{other.name.replace('vllm', 'vLLM')} (measured elsewhere)",
        colour=_VLLM,
        points=points,
        style={
            "marker": "D",
            "markersize": 4,
            "markerfacecolor": "white",
            "linestyle": ":",
            "linewidth": 1.5,
            "zorder": 3,
        },
    )


def _draw_time(ax: Axes, rows: Sequence[Row], elsewhere: Sequence[Elsewhere]) -> None:
    floors = floor_at(rows)
    lines = _lines(rows, lambda row: row.times_floor)
    for other in elsewhere:
        taken = dict(zip(other.tokens, other.us, strict=True))
        ratios = {T: us / floors[T] for T, us in taken.items() if T in floors}
        if ratios:
            lines.append(_elsewhere_line(other, ratios))
    for line in lines:
        _plot(ax, line)
        _say_what_is_beyond(ax, line)
    ax.axhline(1, color="black", linestyle="--", linewidth=1.2, label="floor: unique bytes read")
    for index, c in enumerate(crossovers(_where_both_were_timed(rows))):
        ax.axvspan(c.below, c.above, color="#e8b93e", alpha=0.25, linewidth=0, zorder=0)
        ax.annotate(
            f"{c.after}\novertakes",
            ((c.below * c.above) ** 0.5, 0.5 - 0.12 * (index % 2)),  # neighbours are apart
            xycoords=("data", "axes fraction"),
            ha="center",
            va="center",
            fontsize=8,
            color=_GREY,
        )
    highest = max(figure for line in lines for figure in line.points.values())
    ax.set_ylim(0.9, min(_LARGEST_RATIO, 1.05 * highest))
    ax.set_title("time of a layer in a chain, over the floor", fontsize=10, loc="left")


def _where_both_were_timed(rows: Sequence[Row]) -> list[Row]:
    """Both layouts' rows at each T that has both: elsewhere neither overtakes."""
    first, second = (layout_rows(rows, name) for name in LAYOUT_COLOURS)
    return [found[T] for T in first.keys() & second.keys() for found in (first, second)]


def _say_what_is_beyond(ax: Axes, line: _Line) -> None:
    """The largest value of a line that leaves the panel, where it does."""
    beyond = {T: ratio for T, ratio in line.points.items() if ratio > _LARGEST_RATIO}
    if beyond:
        T = max(beyond, key=beyond.get)
        ax.annotate(
            f"{beyond[T]:.1f} at {T}",
            (min(beyond), 0.88),
            xycoords=("data", "axes fraction"),
            color=line.colour,
            **_BEYOND,
        )


def _draw_bandwidth(ax: Axes, rows: Sequence[Row], elsewhere: Sequence[Elsewhere]) -> None:
    for line in _lines(rows, lambda row: row.unique_tbps):
        _plot(ax, line)
    bytes_at = {row.tokens: row.unique_bytes for row in rows if row.unique_bytes is not None}
    for other in elsewhere:
        taken = dict(zip(other.tokens, other.us, strict=True))
        tbps = {T: bytes_at[T] / us / 1e6 for T, us in taken.items() if T in bytes_at}
        if tbps:
            _plot(ax, _elsewhere_line(other, tbps))
    ceiling = next(row.run.read_ceiling_tbps for row in rows if row.times_floor is not None)
    ax.axhline(ceiling, color="black", linestyle="--", linewidth=1.2)
    ax.annotate(
        f"read ceiling {ceiling:.2f} TB/s",
        (0.99, ceiling),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.set_ylim(0, 1.12 * ceiling)
    ax.set_title("bandwidth on unique bytes, TB/s", fontsize=10, loc="left")


def _draw_error(ax: Axes, rows: Sequence[Row], elsewhere: Sequence[Elsewhere]) -> None:
    for line in _lines(rows, lambda row: row.rel_error):
        _plot(ax, line)
    for other in elsewhere:
        if other.rel_errors:
            middle = sum(other.rel_errors) / len(other.rel_errors)
            _plot(ax, _elsewhere_line(other, dict.fromkeys(other.tokens, middle)))
            ax.fill_between(
                (min(other.tokens), max(other.tokens)), *other.rel_errors, color=_VLLM, alpha=0.15
            )
    ax.axhline(
        BF16_ROUNDING,
        color=_GREY,
        linestyle="--",
        linewidth=1.2,
        label="bf16's own rounding of the output",
    )
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:.3g}"))
    ax.set_title("relative error to a float32 reference, 1e-3", fontsize=10, loc="left")


def finish_axis(ax: Axes, label: str = "tokens T") -> None:
    """A logarithmic axis with a tick at each value that a line has there, from 1 up."""
    tokens = sorted({T for line in ax.get_lines() for T in line.get_xdata() if T >= 1})
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [str(T) for T in tokens])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
