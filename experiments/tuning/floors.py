"""How far from the floor the entries of a tuned table are, as Markdown.

A row's floor is the unique bytes of the very routings that its run drew, at that run's own read
ceiling, as in compare_layouts.
"""

from experiments.compare import byte_model, timing
from experiments.tuning.work import Layer, draw_routings
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.tuned_tables import Entry, Table

# What the kernels may take beyond the floor, by the largest T: launches, grouping and combine.
_ALLOWED_US = ((8, 7.0), (128, 10.0))
_COLUMNS = (
    "layer | T | floor | auto | by | invariant | over the floor | times the floor | within | commit"
)
_ALIGNMENT = "--- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- | ---"


def floor_us(entry: Entry, run: dict) -> float:
    """Microseconds to read the unique bytes of the routings that `run` timed the entry with.

    Raises:
      ValueError: the entry is of no preset, or the run does not say what it drew and read.
    """
    if _preset(entry) not in SHAPES:
        raise ValueError(f"of is {entry.of!r}; expected one of {sorted(SHAPES)}, or its shard")
    for field in ("routing", "seed", "read_ceiling_tbps"):
        if run.get(field) is None:
            raise ValueError(f"runs[{entry.run}].{field} is missing: no floor is known")
    layer = Layer(entry.of, entry.shapes, SHAPES[_preset(entry)].E)
    drawn = draw_routings(layer, run["routing"], entry.T, timing.STEPS, run["seed"])
    unique = byte_model.traffic(drawn, entry.shapes).unique_bytes
    return byte_model.floor_us(unique, run["read_ceiling_tbps"])


def _preset(entry: Entry) -> str:
    return entry.of.partition(",")[0]


def to_markdown(table: Table) -> str:
    """The table's entries in the order of the presets, shards behind their layers.

    Raises:
      ValueError: as floor_us.
    """
    invariant = {(entry.shapes, entry.T): entry for entry in table.invariant}
    order = {name: index for index, name in enumerate(SHAPES)}
    ordered = sorted(table.fastest, key=lambda e: (order.get(_preset(e), -1), e.of, e.T))
    lines = [f"| {_COLUMNS} |", f"| {_ALIGNMENT} |"]
    for entry in ordered:
        run = table.runs[entry.run]
        floor = floor_us(entry, run)
        allowed = next(us for most, us in _ALLOWED_US if most >= entry.T)
        over = entry.us - floor
        same_bits = invariant.get((entry.shapes, entry.T))
        cells = [
            entry.of,
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
