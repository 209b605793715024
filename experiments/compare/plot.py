"""The result picture: time, bandwidth and error against tokens, floor and crossover drawn in."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from experiments.compare.records import Environment, Measurement
from experiments.compare.report import crossovers, floor_at

# A candidate keeps its colour from picture to picture; layouts are bold, baselines thin.
_COLOURS = {
    "output_major": "#0b6e99",
    "expert_major": "#d1495b",
    "xla_gather": "#8a7fb5",
    "xla_ragged": "#b08a3e",
    "xla_dense": "#7f8c8d",
    "bf16_rounding": "#555555",
    "tokamax": "#4d8f6f",
    "vllm": "#c26b9d",
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_GREY = "#666666"
# Two layouts often lie on one another: the first is drawn broad, the next ones narrower on top.
_LAYOUT_WIDTHS = (4.0, 2.0, 1.2)
_LAYOUT_MARKERS = (8.5, 5.5, 4.0)


def draw(path: pathlib.Path, environment: Environment, measurements: Sequence[Measurement]) -> None:
    """Writes the PNG; a panel that has no figures on this device is left out."""
    panels = [
        (_draw_time, any(m.chain_us is not None for m in measurements)),
        (_draw_bandwidth, any(m.unique_tbps is not None for m in measurements)),
        (_draw_error, any(m.rel_error is not None for m in measurements)),
    ]
    panels = [panel for panel, has_figures in panels if has_figures]
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.4 * len(panels) + 0.4, 5.2), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        panel(ax, environment, measurements)
        _finish_tokens_axis(ax, sorted({m.tokens for m in measurements}))
    handles: dict[str, object] = dict.fromkeys(m.name for m in measurements)
    for ax in axes[0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    handles = {label: handle for label, handle in handles.items() if handle is not None}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    first = measurements[0]
    figure.suptitle(
        f"One MoE layer's experts at decode: {first.preset}, {first.routing} routing, "
        f"{first.dtype} output, {environment.device_kind}",
        fontsize=12,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_time(ax: Axes, environment: Environment, measurements: Sequence[Measurement]) -> None:
    _draw_field(ax, measurements, "chain_us")
    floors = floor_at(environment, measurements)
    if floors:
        tokens = sorted(floors)
        floor = [floors[T] for T in tokens]
        ax.plot(tokens, floor, color="black", linestyle="--", linewidth=1.2, label="floor")
        ax.fill_between(tokens, floor, min(floor) / 3, color="black", alpha=0.06, linewidth=0)
        ax.set_ylim(bottom=min(floor) / 1.6)
    _mark_crossovers(ax, measurements, in_words=True)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.set_title("time of a layer in a chain, us (log)", fontsize=10, loc="left")


def _draw_bandwidth(
    ax: Axes, environment: Environment, measurements: Sequence[Measurement]
) -> None:
    _draw_field(ax, measurements, "unique_tbps")
    ceiling = environment.read_ceiling_tbps
    if ceiling is not None:
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
    _mark_crossovers(ax, measurements)
    ax.set_title("bandwidth on unique bytes, TB/s", fontsize=10, loc="left")


def _draw_error(ax: Axes, environment: Environment, measurements: Sequence[Measurement]) -> None:
    del environment
    _draw_field(ax, measurements, "rel_error")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:.3g}"))
    ax.set_title("relative error to a float32 reference, 1e-3", fontsize=10, loc="left")


def _draw_field(ax: Axes, measurements: Sequence[Measurement], field: str) -> None:
    """A line for each candidate that has figures, the layouts above the baselines."""
    names = list(dict.fromkeys(m.name for m in measurements))
    layouts = list(dict.fromkeys(m.name for m in measurements if m.kind == "layout"))
    for index, name in enumerate(names):
        own = sorted((m for m in measurements if m.name == name), key=lambda m: m.tokens)
        own = [m for m in own if getattr(m, field) is not None]
        if not own:
            continue
        layout = own[0].kind == "layout"
        rank = min(layouts.index(name), len(_LAYOUT_WIDTHS) - 1) if layout else 0
        ax.plot(
            [m.tokens for m in own],
            [getattr(m, field) for m in own],
            color=_COLOURS.get(name, f"C{index}"),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=_LAYOUT_MARKERS[rank] if layout else 4,
            linewidth=_LAYOUT_WIDTHS[rank] if layout else 1.1,
            linestyle="-" if layout else ":",
            zorder=3 if layout else 2,
            label=name,
        )


def _mark_crossovers(ax: Axes, measurements: Sequence[Measurement], in_words: bool = False) -> None:
    """A band between the two token counts between which another layout becomes the fastest."""
    for c in crossovers(measurements):
        ax.axvspan(c.below, c.above, color="#e8b93e", alpha=0.25, linewidth=0, zorder=0)
        if not in_words:
            continue
        ax.annotate(
            f"{c.after}\novertakes",
            ((c.below * c.above) ** 0.5, 0.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8,
            color=_GREY,
        )


def _finish_tokens_axis(ax: Axes, tokens: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [str(T) for T in tokens])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("tokens T")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
