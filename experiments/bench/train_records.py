"""What experiments.train found: rows for a JSONL, and the picture of one run or of two.

    {"kind": "step", "run": 0, "step": 10, "loss": 6.81, "load": [[412, 530, ...], ...], ...}
    {"kind": "saved", "run": 0, "step": 100, "held_out_loss": 4.92}
    {"kind": "held_out", "run": 0, "step": 300, "perplexity": 41.2, "unigram_perplexity": 512.3}

A run that goes on adds its rows to those that lead to the state that it goes on from. The file
around them is that of records.py.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench import records
from experiments.bench.environment import Environment
from moe_jax.training import TrainMetrics

_COLOURS = ("#0b6e99", "#d1495b")


@dataclasses.dataclass(kw_only=True)
class StepRow:
    """One step, as TrainMetrics has it; `step` counts it among those done.

    Attributes:
      run: where and how it was computed.
      kind: "step".
      tokens_per_second: since the row before; None where a step was compiled.
    """

    run: Environment
    kind: str = "step"
    step: int
    loss: float
    cross_entropy: float
    aux_loss: float
    z_loss: float
    gradient_norm: float
    learning_rate: float
    targets: int
    tokens: int
    imbalance: list[float]
    load: list[list[int]]
    load_entropy: list[float]
    router_entropy: list[float]
    tokens_per_second: float | None = None

    @classmethod
    def of(
        cls, run: Environment, step: int, metrics: TrainMetrics, tokens_per_second: float | None
    ) -> "StepRow":
        """The row of a step's metrics."""
        found = {
            field.name: np.asarray(getattr(metrics, field.name)).tolist()
            for field in dataclasses.fields(metrics)
        }
        return cls(run=run, step=step, tokens_per_second=tokens_per_second, **found)

    @property
    def described(self) -> str:
        """The step in a few words."""
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.0f} tok/s"
        imbalance = f", imbalance {max(self.imbalance):.2f}" if self.imbalance else ""
        return f"step {self.step}: loss {self.loss:.3f}{rate}{imbalance}"


@dataclasses.dataclass(kw_only=True)
class SavedRow:
    """A state that is to be saved, after `step` steps.

    Attributes:
      run, kind: as in StepRow; "saved".
      held_out_loss: the mean cross entropy of some rows of the held-out text, in nats.
    """

    run: Environment
    kind: str = "saved"
    step: int
    held_out_loss: float


@dataclasses.dataclass(kw_only=True)
class HeldOutRow:
    """The held-out text after `step` steps.

    Attributes:
      run, kind: as in StepRow; "held_out".
      tokens: how many the text has.
      context: the most that a prediction sees.
      perplexity: of the model.
      unigram_perplexity: of the training text's token frequencies.
    """

    run: Environment
    kind: str = "held_out"
    step: int
    tokens: int
    context: int
    perplexity: float
    unigram_perplexity: float


Row = StepRow | SavedRow | HeldOutRow
KINDS: Mapping[str, type] = {"step": StepRow, "saved": SavedRow, "held_out": HeldOutRow}


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a run's metrics.

    Raises:
      ValueError: a line is none of this format, or there is no step; names the file.
    """
    record = records.read_record(path, KINDS)
    if not steps_of(record):
        raise ValueError(f"{path} has no row of kind 'step'; expected what experiments.train wrote")
    return record


def rows_until(path: pathlib.Path, step: int) -> list[Row]:
    """The rows that a run wrote on its way to the state of a step; none without the file.

    Raises:
      ValueError: as read_record.
    """
    if step == 0 or not path.is_file():
        return []
    rows = read_record(path).rows
    return [row for row in rows if row.step < step or (row.step == step and row.kind != "held_out")]


def steps_of(record: records.Record) -> list[StepRow]:
    """The rows of steps, in order."""
    return [row for row in record.rows if row.kind == "step"]


def draw(path: pathlib.Path, runs: Mapping[str, records.Record]) -> None:
    """Writes the PNG of `figure_of`."""
    figure_of(runs).savefig(path, dpi=130, pil_kwargs={"optimize": True})


def figure_of(runs: Mapping[str, records.Record]) -> Figure:
    """Loss and imbalance over steps, then each run's load of every expert over steps.

    Made without pyplot, because importing that would choose a backend for the whole process.

    Args:
      runs: one record or two, by what their lines are called.
    """
    with_experts = {name: record for name, record in runs.items() if steps_of(record)[0].load}
    count = 1 + bool(with_experts) + len(with_experts)
    figure = Figure(figsize=(4.4 * count, 4.0), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    _draw_loss(axes.pop(0), runs)
    if with_experts:
        _draw_imbalance(axes.pop(0), with_experts)
        largest = max(_shares(record).max() for record in with_experts.values())
        for ax, (name, record) in zip(axes, with_experts.items(), strict=True):
            _draw_load(figure, ax, name, record, largest)
    return figure


def _draw_loss(ax: Axes, runs: Mapping[str, records.Record]) -> None:
    for (name, record), colour in zip(runs.items(), _COLOURS, strict=False):
        rows = steps_of(record)
        ax.plot([r.step for r in rows], [r.cross_entropy for r in rows], color=colour, label=name)
        saved = [row for row in record.rows if row.kind == "saved"]
        ax.plot([r.step for r in saved], [r.held_out_loss for r in saved], ".", color=colour)
        for row in record.rows:
            if row.kind == "held_out":
                ax.plot(row.step, math.log(row.perplexity), "D", color=colour, label="  held out")
    unigrams = [r for record in runs.values() for r in record.rows if r.kind == "held_out"]
    if unigrams:
        unigram = math.log(unigrams[0].unigram_perplexity)
        ax.axhline(unigram, color="#666666", linestyle="--", label="unigram, held out")
    _finish(ax, "cross entropy, nats a token")
    ax.legend(frameon=False)


def _draw_imbalance(ax: Axes, runs: Mapping[str, records.Record]) -> None:
    for (name, record), colour in zip(runs.items(), _COLOURS, strict=False):
        rows = steps_of(record)
        for layer, values in enumerate(zip(*(row.imbalance for row in rows), strict=True)):
            label = name if layer == 0 else None
            alpha = 1 - 0.6 * layer / max(len(rows[0].imbalance) - 1, 1)
            ax.plot([r.step for r in rows], values, color=colour, label=label, alpha=alpha)
    ax.set_ylim(bottom=1)
    _finish(ax, "imbalance: largest load / mean load, each layer")
    ax.legend(frameon=False)


def _draw_load(figure: Figure, ax: Axes, name: str, record: records.Record, largest: float) -> None:
    """The layer whose last imbalance is the largest."""
    rows = steps_of(record)
    layer = int(np.argmax(rows[-1].imbalance))
    shares = _shares(record)[:, layer]  # [rows, E]
    picture = ax.pcolormesh(
        [row.step for row in rows],
        range(shares.shape[1]),
        shares.T,
        cmap="viridis",
        vmin=0,
        vmax=largest,
        shading="nearest",
    )
    figure.colorbar(picture, ax=ax, label="share of the layer's assignments")
    ax.set_xlabel("step")
    ax.set_title(f"load of the experts of MoE layer {layer}: {name}", fontsize=10)


def _shares(record: records.Record) -> np.ndarray:
    """[rows, layers, E]: each load over its layer's."""
    load = np.asarray([row.load for row in steps_of(record)], np.float64)
    return load / np.maximum(load.sum(-1, keepdims=True), 1)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
