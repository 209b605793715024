"""The table and the lines on disk: merged, resumed, whole or not at all."""

import pathlib

import jax
import pytest

from experiments.bench.candidates import Configured, configs_to_tune
from experiments.bench.tuning_bench import Layer
from experiments.bench.tuning_store import Line, Store, lines_of_text
from experiments.bench.tuning_sweep import Dropped, Measured
from pallas_kernels.decode_experts import LAYOUTS, ExpertShapes
from pallas_kernels.decode_experts.tuned_tables import parse
from tests.experiments.fake_bench import SHAPES

DEVICE = "NVIDIA H100 80GB HBM3"
LAYER = Layer("made up", SHAPES, SHAPES.E)
OUTPUT, EXPERT = configs_to_tune(tuple(LAYOUTS), SHAPES, 1, 1)


@pytest.fixture
def open_store(tmp_path):
    """A function of the commit: (a Store on the same two files, what it said)."""

    def open_(commit="abc", device=DEVICE, **changes):
        run = {"device_kind": device, "jax": jax.__version__, "commit": commit} | changes
        said = []
        return Store(tmp_path / "out", tmp_path / "records", device, run, said.append), said

    (tmp_path / "out").mkdir()
    (tmp_path / "records").mkdir()
    return open_


def _measured(candidate: Configured, us: float) -> Measured:
    return Measured(candidate, us, 0.5, 1.65e-3)


def _lines(store: Store) -> list[Line]:
    return lines_of_text(store.records_path.read_text(), lambda error: pytest.fail(str(error)))


def _read(store: Store):
    return parse(store.path.read_text(), jax.__version__)


def test_sweeps_of_several_runs_are_merged(open_store):
    store, said = open_store("first")
    assert store.path.name == "h100.json"
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0), _measured(EXPERT, 35.0)], [])
    again, _ = open_store("second")
    assert again.has(SHAPES, 1) and not again.has(SHAPES, 64)
    again.add(LAYER, 64, [_measured(OUTPUT, 900.0), _measured(EXPERT, 400.0)], [])
    table = _read(again)
    assert [(e.T, e.layout, e.us) for e in table.fastest] == [
        (1, "output_major", 30.0),
        (64, "expert_major", 400.0),
    ]
    # Chosen over both runs: the lines remember what the table has no entry of.
    assert [(e.T, e.layout, e.us) for e in table.invariant] == [
        (1, "expert_major", 35.0),
        (64, "expert_major", 400.0),
    ]
    commits = [table.runs[e.run]["commit"] for e in [*table.fastest, *table.invariant]]
    assert commits == ["first", "second", "first", "second"]
    assert len(table.runs) == 2
    assert said == []


def test_a_new_sweep_replaces_the_old_one_and_its_run(open_store):
    store, _ = open_store("first")
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    again, _ = open_store("second")
    again.add(LAYER, 1, [_measured(EXPERT, 40.0)], [])
    table = _read(again)
    assert [(e.layout, e.us) for e in table.fastest] == [("expert_major", 40.0)]
    assert [run["commit"] for run in table.runs] == ["second"]
    assert [line.fields["us"] for line in _lines(again)] == [40.0]


def test_without_the_lines_the_tables_own_order_of_sums_goes_on(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0), _measured(EXPERT, 35.0)], [])
    store.add(LAYER, 64, [_measured(OUTPUT, 900.0), _measured(EXPERT, 400.0)], [])
    store.records_path.unlink()
    again, said = open_store()
    again.add(LAYER, 8, [_measured(OUTPUT, 170.0), _measured(EXPERT, 180.0)], [])
    assert {(e.T, e.layout) for e in _read(again).invariant} == {
        (T, "expert_major") for T in (1, 8, 64)
    }
    third, said = open_store()
    third.add(LAYER, 16, [_measured(OUTPUT, 300.0)], [])
    assert _read(third).invariant == []
    assert "no order of sums was measured at every T" in said[0]


def test_what_was_dropped_has_a_line(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [Dropped(EXPERT, "it does not compile")])
    lines = _lines(store)
    assert [line.fields.get("error") for line in lines] == [None, "it does not compile"]
    assert "us" not in lines[1].fields
    # The run and the layer have a line each, not one in every candidate's.
    assert len(store.records_path.read_text().splitlines()) == 4
    again, said = open_store()
    again.write()
    assert _lines(again) == lines
    assert said == []


def test_a_sweep_without_result_makes_no_entry(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [], [Dropped(EXPERT, "it does not compile")])
    assert not store.path.exists()
    assert not open_store()[0].has(SHAPES, 1)


def test_other_shapes_are_left_alone(open_store):
    other = Layer("another", ExpertShapes(E=8, K=2, H=256, I=128), 8)
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    store.add(other, 8, [_measured(EXPERT, 40.0)], [])
    table = _read(store)
    assert {(e.of, e.T) for e in table.fastest} == {("made up", 1), ("another", 8)}
    assert {(e.of, e.T) for e in table.invariant} == {("made up", 1), ("another", 8)}


@pytest.mark.parametrize("text", ["{", '{"format": 0}'])
def test_a_table_that_is_no_use_is_written_anew(open_store, text):
    store, _ = open_store()
    store.path.write_text(text)
    again, said = open_store()
    assert "is written anew" in said[0]
    again.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    assert len(_read(again).fastest) == 1


def test_results_of_another_jax_are_measured_anew(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    for path in (store.path, store.records_path):
        path.write_text(path.read_text().replace(jax.__version__, "0.1.0"))
    again, said = open_store()
    assert not again.has(SHAPES, 1)
    assert "tune again" in said[0]


def test_another_device_of_the_same_short_name_is_refused(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    with pytest.raises(ValueError, match="is of 'NVIDIA H100 80GB HBM3' and this device is"):
        open_store(device="NVIDIA H100 PCIe")


def test_a_broken_line_is_left_out(open_store):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    with store.records_path.open("a") as file:
        file.write('{"E": 8\n')
    _, said = open_store()
    assert len(said) == 1 and "is left out" in said[0]


def test_a_write_that_is_cut_off_leaves_the_table_that_was_there(open_store, monkeypatch):
    store, _ = open_store()
    store.add(LAYER, 1, [_measured(OUTPUT, 30.0)], [])
    before = store.path.read_text()
    write = pathlib.Path.write_text

    def cut_off(path, text, **keywords):
        write(path, text[: len(text) // 2], **keywords)
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_text", cut_off)
    with pytest.raises(OSError, match="no space"):
        store.add(LAYER, 8, [_measured(OUTPUT, 200.0)], [])
    assert store.path.read_text() == before
