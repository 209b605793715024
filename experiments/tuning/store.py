"""What has been measured, on disk: the table, and a line about every candidate beside it.

The table <out>/<device>.json holds the winners. <records>/<device>_measured.jsonl holds a line for
every candidate: with those an order of sums for all T can be chosen although the T were swept in
several runs; without them, of what the table knows. Both are written whole or not at all.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from experiments.tuning import winners
from experiments.tuning.sweep import Dropped, Measured
from experiments.tuning.work import Layer
from pallas_kernels.decode_experts import ExpertShapes, tuned_tables
from pallas_kernels.decode_experts.tuned_tables import (
    Entry,
    Table,
    TableError,
    make_config,
    parse,
    to_text,
)

_Key = tuple[ExpertShapes, int]


class Row(NamedTuple):
    """A measurement and the run that it was made in."""

    of: str
    shapes: ExpertShapes
    T: int
    layout: str
    config: Any
    us: float
    rel_error: float | None
    run: dict[str, Any]


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
        slug = tuned_tables.device_slug(device_kind)
        self.path = out / f"{slug}.json"
        self.records_path = records / f"{slug}_measured.jsonl"
        self._device_kind, self._run, self._say = device_kind, run, say
        self._rows: dict[_Key, list[Row]] = {}
        self._lines: dict[_Key, list[dict]] = {}
        self._fastest: dict[_Key, Row] = {}
        self._invariant: dict[_Key, Row] = {}
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
            Row(layer.of, layer.shapes, T, *m.candidate, m.us, m.rel_error, self._run)
            for m in measured
        ]
        self._rows[key] = rows
        self._lines[key] = [
            *(_line(row, spread_us=m.spread_us) for row, m in zip(rows, measured, strict=True)),
            *(
                _line(Row(layer.of, layer.shapes, T, *d.candidate, 0, 0, self._run), error=d.why)
                for d in dropped
            ),
        ]
        if rows:
            self._fastest[key] = winners.fastest(rows)
            self._choose_invariant(layer.shapes)
        self.write()

    def write(self) -> None:
        """Writes both files."""
        lines = [json.dumps(line) for some in self._lines.values() for line in some]
        _replace(self.records_path, "".join(line + "\n" for line in lines))
        if self._fastest:
            _replace(self.path, to_text(self.table()))

    def table(self) -> Table:
        """The table as it stands; runs that no entry is of are left out."""
        runs: list[dict] = []

        def entry(row: Row) -> Entry:
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
        chosen = winners.invariant(measured)
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
                fields = {name: getattr(entry, name) for name in Row._fields}
                row = Row(**fields | {"run": table.runs[entry.run]})
                rows[row.shapes, row.T] = row
                known = self._rows.setdefault((row.shapes, row.T), [])
                if not any((k.layout, k.config) == (row.layout, row.config) for k in known):
                    known.append(row)

    def _read_lines(self) -> None:
        if not self.records_path.exists():
            return
        for text in self.records_path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                if (line["device_kind"], line["jax"]) != (self._device_kind, jax.__version__):
                    continue
                shapes = ExpertShapes(**{name: line[name] for name in "EKHI"})
                key = shapes, line["T"]
                if line.get("error") is None:
                    config = make_config(line["layout"], line["config"], shapes)
                    row = Row(**{n: line[n] for n in Row._fields if n not in ("shapes", "config")},
                              shapes=shapes, config=config)  # fmt: skip
                    self._rows.setdefault(key, []).append(row)
            except (ValueError, KeyError, TypeError) as error:
                self._say(f"a line of {self.records_path} is left out: {error!r}"[:300])
                continue
            self._lines.setdefault(key, []).append(line)


def _line(row: Row, **more: Any) -> dict[str, Any]:
    fields = row._asdict()
    shapes, config = fields.pop("shapes"), fields.pop("config")
    if "error" in more:
        del fields["us"], fields["rel_error"]
    return {
        **dataclasses.asdict(shapes),
        **fields,
        "config": dataclasses.asdict(config),
        **more,
        "device_kind": row.run["device_kind"],
        "jax": row.run["jax"],
    }


def _replace(path: pathlib.Path, text: str) -> None:
    # A run killed here, or a full disk, leaves the file that was there before.
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
