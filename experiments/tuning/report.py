"""The table that a run ends with."""

import dataclasses
from typing import Any

import rich.table

from pallas_kernels.decode_experts import LAYOUTS, ExpertShapes
from pallas_kernels.decode_experts.tuned_tables import Entry, Table


def make(table: Table) -> rich.table.Table:
    """Each layer and T: what "auto" and "invariant" take there, and how long it takes."""
    shown = rich.table.Table(
        title=f"{table.device_kind}, jax {table.jax}: microseconds of a layer, L2 cold",
        title_justify="left",
    )
    for title, justify in (
        ("layer", "left"),
        ("T", "right"),
        ("auto", "left"),
        ("us", "right"),
        ("invariant", "left"),
        ("us", "right"),
        ("relative error", "right"),
    ):
        shown.add_column(title, justify=justify)
    invariant = {(entry.shapes, entry.T): entry for entry in table.invariant}
    before = None
    ordered = sorted(table.fastest, key=lambda e: (e.of, dataclasses.astuple(e.shapes), e.T))
    for entry in ordered:
        same = invariant.get((entry.shapes, entry.T))
        shown.add_row(
            entry.of if entry.shapes != before else "",
            str(entry.T),
            _in_short(entry),
            f"{entry.us:.1f}",
            _in_short(same) if same else "-",
            f"{same.us:.1f}" if same else "-",
            f"{entry.rel_error:.2e}",
        )
        before = entry.shapes
    return shown


def _in_short(entry: Entry) -> str:
    """The layout, and what differs from its default."""
    return " ".join([entry.layout, *_changes(entry.layout, entry.config, entry.shapes, entry.T)])


def _changes(layout: str, config: Any, shapes: ExpertShapes, T: int) -> list[str]:
    default = dataclasses.asdict(LAYOUTS[layout].default_config(shapes, T))
    found = dataclasses.asdict(config)
    return [f"{name}={value}" for name, value in found.items() if value != default[name]]
