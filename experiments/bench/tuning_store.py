"""What has been measured, on disk: the table, and a line about every candidate beside it.

The table <out>/<device>.json holds the winners. <records>/<device>_measured.jsonl holds a line for
every candidate: with those an order of sums for all T can be chosen although the T were swept in
several runs; without them, of what the table knows. Both are written whole or not at all.

    {"run": {"device_kind": "NVIDIA H100 80GB HBM3", "jax": "0.11.2", "commit": ..., ...}}
    {"layer": {"of": "qwen3_30b_a3b", "E": 128, "K": 8, "H": 2048, "I": 768}}
    {"in": [0, 0], "T": 8, "layout": "expert_major", "config": {...}, "us": 161.2, ...}

`in` says which run and which layer, counted from 0.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from experiments.bench.tuning_bench import Layer
from experiments.bench.tuning_sweep import Dropped, Measured, fastest, invariant
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.tuned_tables import (
    Entry,
    Table,
    TableError,
    device_slug,
    make_config,
    parse,
    to_text,
)

_Key = tuple[ExpertShapes, int]


class TunedRow(NamedTuple):
    """A measurement and the run that it was made in."""

    of: str
    shapes: ExpertShapes
    T: int
    layout: str
    config: Any
    us: float
    rel_error: float | None
    run: dict[str, Any]


class Line(NamedTuple):
    """What the records hold of one candidate; `fields` are those of the JSON but for `in`."""

    run: dict[str, Any]
    layer: dict[str, Any]
    fields: dict[str, Any]


class Store:
    """The table and the lines of one device; everything of another jax or device is left out."""

    def __init__(
        self,
        out: pathlib.Path,
        records: pathlib.Path,
        device_kind: str,
        run: dict[str, Any],
        say: Callable[[str], None],
    ):
        """Reads what is there.

        Raises:
          ValueError: the table's file is another device's, of the same short name.
        """
        slug = device_slug(device_kind)
        self.path = out / f"{slug}.json"
        self.records_path = records / f"{slug}_measured.jsonl"
        self._device_kind, self._run, self._say = device_kind, run, say
        self._rows: dict[_Key, list[TunedRow]] = {}
        self._lines: dict[_Key, list[Line]] = {}
        self._fastest: dict[_Key, TunedRow] = {}
        self._invariant: dict[_Key, TunedRow] = {}
        self._read_lines()
        self._read_table()

    def has(self, shapes: ExpertShapes, T: int) -> bool:
        """Whether the table has an entry already."""
        return (shapes, T) in self._fastest

    def add(
        self, layer: Layer, T: int, measured: list[Measured], dropped: Iterable[Dropped]
    ) -> None:
        """Puts one sweep in, in the place of an earlier one, and writes both files."""
        key = layer.shapes, T
        rows = [
            TunedRow(layer.of, layer.shapes, T, *m.candidate, m.us, m.rel_error, self._run)
            for m in measured
        ]
        self._rows[key] = rows
        self._lines[key] = [
            self._line(layer, T, m.candidate, us=m.us, spread_us=m.spread_us, rel_error=m.rel_error)
            for m in measured
        ] + [self._line(layer, T, d.candidate, error=d.why) for d in dropped]
        if rows:
            self._fastest[key] = fastest(rows)
            self._choose_invariant(layer.shapes)
        self.write()

    def write(self) -> None:
        """Writes both files."""
        lines = [line for some in self._lines.values() for line in some]
        _replace(self.records_path, lines_to_text(lines))
        if self._fastest:
            _replace(self.path, to_text(self.table()))

    def table(self) -> Table:
        """The table as it stands; runs that no entry is of are left out."""
        runs: list[dict] = []

        def entry(row: TunedRow) -> Entry:
            if row.run not in runs:
                runs.append(row.run)
            return Entry(**row._asdict() | {"run": runs.index(row.run)})

        return Table(
            device_kind=self._device_kind,
            jax=jax.__version__,
            fastest=[entry(row) for row in self._fastest.values()],
            invariant=[entry(row) for row in self._invariant.values()],
            runs=runs,
        )

    def _choose_invariant(self, shapes: ExpertShapes) -> None:
        measured = {T: self._rows[shapes_, T] for shapes_, T in self._fastest if shapes_ == shapes}
        chosen = invariant(measured)
        if not chosen:
            self._say(f"no order of sums was measured at every T of {shapes}: none is in the table")
        self._invariant = {key: row for key, row in self._invariant.items() if key[0] != shapes}
        self._invariant |= {(shapes, T): row for T, row in chosen.items()}

    def _read_table(self) -> None:
        try:
            table = parse(self.path.read_text(encoding="utf-8"), jax.__version__)
        except FileNotFoundError:
            return
        except (UnicodeDecodeError, TableError) as error:
            self._say(f"{self.path} is written anew: {error}")
            return
        if table.device_kind != self._device_kind:
            raise ValueError(
                f"{self.path} is of {table.device_kind!r} and this device is "
                f"{self._device_kind!r}; expected another --out"
            )
        for entries, rows in (
            (table.fastest, self._fastest),
            (table.invariant, self._invariant),
        ):
            for entry in entries:
                fields = {name: getattr(entry, name) for name in TunedRow._fields}
                row = TunedRow(**fields | {"run": table.runs[entry.run]})
                rows[row.shapes, row.T] = row
                known = self._rows.setdefault((row.shapes, row.T), [])
                if not any((k.layout, k.config) == (row.layout, row.config) for k in known):
                    known.append(row)

    def _read_lines(self) -> None:
        if not self.records_path.exists():
            return

        def say(error: Exception) -> None:
            self._say(f"a line of {self.records_path} is left out: {error!r}"[:300])

        for line in lines_of_text(self.records_path.read_text(encoding="utf-8"), say):
            if (line.run["device_kind"], line.run["jax"]) != (self._device_kind, jax.__version__):
                continue
            try:
                sizes = dict(line.layer)
                of, shapes = sizes.pop("of"), ExpertShapes(**sizes)
                fields = line.fields
                key = shapes, fields["T"]
                if fields.get("error") is None:
                    config = make_config(fields["layout"], fields["config"], shapes)
                    figures = {name: fields[name] for name in ("T", "layout", "us", "rel_error")}
                    row = TunedRow(of=of, shapes=shapes, config=config, run=line.run, **figures)
                    self._rows.setdefault(key, []).append(row)
            except (ValueError, KeyError, TypeError) as error:
                say(error)
                continue
            self._lines.setdefault(key, []).append(line)

    def _line(self, layer: Layer, T: int, candidate, **figures: Any) -> Line:
        config = dataclasses.asdict(candidate.config)
        return Line(
            run=self._run,
            layer={"of": layer.of, **dataclasses.asdict(layer.shapes)},
            fields={"T": T, "layout": candidate.layout, "config": config, **figures},
        )


def lines_to_text(lines: Iterable[Line]) -> str:
    """The records' file: runs and layers once each, before the candidates."""
    lines = list(lines)
    runs, layers = [], []
    for line in lines:
        for found, one in ((runs, line.run), (layers, line.layer)):
            if one not in found:
                found.append(one)
    made: list[dict] = [{"run": run} for run in runs] + [{"layer": layer} for layer in layers]
    for line in lines:
        place = {"in": [runs.index(line.run), layers.index(line.layer)]}
        made.append(place | {name: _rounded(value) for name, value in line.fields.items()})
    return "".join(json.dumps(each) + "\n" for each in made)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def lines_of_text(text: str, say: Callable[[Exception], None]) -> list[Line]:
    """Reads what `lines_to_text` made; `say` is told of each line that is none."""
    runs, layers, found = [], [], []
    for one in text.splitlines():
        try:
            fields = json.loads(one)
            if "run" in fields:
                runs.append(fields["run"])
            elif "layer" in fields:
                layers.append(fields["layer"])
            else:
                run, layer = fields.pop("in")
                found.append(Line(runs[run], layers[layer], fields))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            say(error)
    return found


def _replace(path: pathlib.Path, text: str) -> None:
    # A run killed here, or a full disk, leaves the file that was there before.
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
