"""How far from the floor the entries of a tuned table are, as Markdown.

A row's floor is the unique bytes of the very routings that its run drew, at that run's own read
ceiling, as in compare_layouts.
"""

from experiments.compare import byte_model, timing
from experiments.compare.presets import PRESETS
from experiments.tuning.work import Layer, draw_routings
from pallas_kernels.decode_experts.tuned_tables import Entry, Table

# What the kernels may take beyond the floor, by the largest T: launches, grouping and combine.
_ALLOWED_US = ((8, 7.0), (128, 10.0))
_COLUMNS = (
    "layer | T | floor | auto | by | invariant | over the floor | times the floor | within | commit"
)
_ALIGNMENT = "--- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- | ---"


def floor_us(entry: Entry, run: dict) -> float:
    """Microseconds to read the unique bytes of the routings that `run` timed the entry with."""
    preset = entry.of.partition(",")[0]
    layer = Layer(entry.of, entry.shapes, PRESETS[preset].E)
    drawn = draw_routings(layer, run["routing"], entry.T, timing.STEPS, run["seed"])
    unique = byte_model.traffic(drawn, entry.shapes).unique_bytes
    return byte_model.floor_us(unique, run["read_ceiling_tbps"])


def to_markdown(table: Table) -> str:
    """The table's entries in the order of the presets, shards behind their layers."""
    invariant = {(entry.shapes, entry.T): entry for entry in table.invariant}
    presets = list(PRESETS)
    ordered = sorted(
        table.fastest, key=lambda e: (presets.index(e.of.partition(",")[0]), e.of, e.T)
    )
    lines = [f"| {_COLUMNS} |", f"| {_ALIGNMENT} |"]
    for entry in ordered:
        run = table.runs[entry.run]
        floor = floor_us(entry, run)
        allowed = next(us for most, us in _ALLOWED_US if most >= entry.T)
        over = entry.us - floor
        cells = [
            entry.of,
            f"{entry.T}",
            f"{floor:.1f}",
            f"{entry.us:.1f}",
            entry.layout,
            f"{invariant[entry.shapes, entry.T].us:.1f}",
            f"{over:.1f}",
            f"{entry.us / floor:.2f}",
            "yes" if over <= allowed else "no",
            run["commit"][:7],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
