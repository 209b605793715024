"""The result file has the format that others read, and tables and picture say what is in it."""

import dataclasses
import json
import pathlib

import pytest

from experiments.bench import decode_records, plots, records, tables
from experiments.bench.decode_records import DecodeRow
from experiments.bench.environment import Environment
from pallas_kernels.decode_experts.tuned_tables import device_slug

RUN = Environment(
    device="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    jax="0.11.2",
    jaxlib="0.11.2",
    driver="580.1",
    python="3.12.1",
    commit="abcdef0123",
    command="python -m experiments.compare_layouts",
    date="2026-11-22T00:00:00+00:00",
    seed=0,
    repeats=20,
    read_ceiling_tbps=3.0,
)
LATER = dataclasses.replace(RUN, date="2026-11-28T00:00:00+00:00", commit="later")


def _row(name, T, chain_us, kind="layout", run=RUN, **fields):
    return records.Row(
        run=run,
        kind=kind,
        name=name,
        tokens=T,
        chain_us=chain_us,
        unique_experts=8.0 * T,
        unique_bytes=75e6 * T,
        requested_bytes=90e6 * T,
        rel_error=1.7e-3,
        **fields,
    )


def _record():
    return records.Record(
        preset="qwen3_30b_a3b",
        rows=[
            _row("output_major", 1, 40.0),
            _row("expert_major", 1, 50.0, rel_error_before_rounding=2e-6),
            _row("xla_gather", 1, 100.0, kind="baseline"),
            _row("output_major", 4, 160.0),
            _row("expert_major", 4, 120.0, run=LATER),
            _row("xla_gather", 4, None, kind="baseline", config={"error": "it broke"}),
            _row("xla_dense", 4, 360.0, kind="baseline"),
            _row("expert_major", 4, 90.0, routing="zipf", run=LATER),
        ],
    )


def test_round_trip(tmp_path):
    path = tmp_path / "results" / "h100_x.jsonl"
    records.write_record(path, _record())
    assert records.read_record(path) == _record()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines[:4]] == ["record", "run", "run", "layout"]
    assert lines[0] == {"kind": "record", "format": 2, "preset": "qwen3_30b_a3b"}
    # What has its default is left out, which halves the file.
    assert "device_us" not in lines[3] and "routing" not in lines[3]
    assert lines[-1]["routing"] == "zipf" and lines[-1]["run"] == 1


def test_a_write_that_breaks_off_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    records.write_record(path, _record())
    before = path.read_text()

    def half(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        records.write_record(path, records.Record(preset="x", rows=_record().rows[:1]))
    assert path.read_text() == before


def test_a_later_run_takes_the_place_of_the_rows_that_it_measured():
    newer = [_row("output_major", 1, 39.0, run=LATER), _row("output_major", 8, 300.0, run=LATER)]
    updated = _record().updated(newer)
    assert len(updated.rows) == len(_record().rows) + 1
    at = {row.key: row for row in updated.rows}
    assert at["output_major", 1, "uniform", "bf16"].chain_us == 39.0
    assert at["expert_major", 4, "zipf", "bf16"].chain_us == 90.0
    assert updated.routings() == ["uniform", "zipf"]


def test_what_follows_from_a_chain_time():
    row = _row("output_major", 1, 50.0)
    assert row.unique_tbps == pytest.approx(1.5)
    assert row.requested_tbps == pytest.approx(1.8)
    assert row.floor_us == pytest.approx(25)
    assert row.times_floor == pytest.approx(2)
    assert row.ceiling_share == pytest.approx(0.5)
    # A bandwidth off the device's own ceiling would mean nothing.
    without = dataclasses.replace(row, run=dataclasses.replace(RUN, read_ceiling_tbps=None))
    assert without.unique_tbps is without.times_floor is without.floor_us is None


def test_values_that_json_lacks_are_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [_row("a", 1, None, max_error=float("inf"))]
    records.write_record(path, records.Record(preset="x", rows=rows))
    assert records.read_record(path).rows[0].max_error is None


HEAD = '{"kind": "record", "format": 2, "preset": "x"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ('{"kind": "layout"}', "expected record on line 1"),
        ('{"kind": "environment"}', "line 1: kind is 'environment'"),
        ('{"kind": "record", "format": 1}', "format is 1; expected 2"),
        (HEAD + HEAD, "line 2: kind is 'record'; expected record on line 1 only"),
        (HEAD + '{"kind": "run"}', r"missing or unknown fields \['command'"),
        (HEAD + '{"kind": "layout", "run": 0}', "run is 0; expected 0 to -1"),
        (HEAD + "[1]", "kind is None"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        records.read_record(path)


def test_sections():
    sections = tables.sections(_record().of())
    by_title = {section.title: dict(section.rows) for section in sections}
    chain = by_title["chain, us"]
    assert chain["floor: unique bytes"] == ["25.0", "100.0"]
    assert chain["xla_gather"] == ["100.0", "failed"]
    assert by_title["times the floor"]["expert_major"] == ["2.00", "1.20"]
    assert by_title["relative error before rounding"] == {"expert_major": ["2.00e-06", "-"]}
    assert "device, us" not in by_title


def test_crossover_and_remarks():
    rows = _record().of()
    assert tables.crossovers(rows) == [tables.Crossover(1, 4, "output_major", "expert_major")]
    text = "\n".join(tables.remarks(rows))
    assert "output_major is the fastest layout up to T = 1, expert_major from T = 4 on." in text
    assert "1.60 at T = 1, 1.20 at T = 4" in text
    assert "Times faster than the best of plain XLA: 2.5 at T = 1, 3.0 at T = 4." in text
    assert "xla_gather error: it broke (T = 4)" in text


def test_a_mode_goes_by_the_layout_that_it_took():
    rows = [
        _row("auto", 1, 40.0, config={"layout": "output_major"}),
        _row("invariant", 1, 50.0, config={"layout": "expert_major"}),
        _row("auto", 4, 125.0, config={"layout": "expert_major"}),
        _row("invariant", 4, 120.0, config={"layout": "expert_major"}),
    ]
    assert tables.crossovers(rows) == [tables.Crossover(1, 4, "output_major", "expert_major")]
    text = "\n".join(tables.remarks(rows))
    assert "auto takes output_major at T = 1; expert_major at T = 4." in text
    assert "invariant takes expert_major at T = 1, 4." in text
    assert tables.crossovers(rows[2:]) == []
    # A layout's own row counts for it, unless a later run has a newer one.
    assert tables.layout_rows(rows, "output_major") == {1: rows[0]}
    own = _row("expert_major", 4, 119.0)
    assert tables.layout_rows([*rows, own], "expert_major")[4] == own
    later = _row("auto", 4, 118.0, run=LATER, config={"layout": "expert_major"})
    assert tables.layout_rows([later, *rows, own], "expert_major")[4] == later


ELSEWHERE = records.Elsewhere(
    name="vllm",
    device="h100",
    preset="qwen3_30b_a3b",
    tokens=(1, 4),
    us=(45.0, 130.0),
    beside_us=(41.0, 121.0),
    rel_errors=(3.8e-3, 4.1e-3),
    source="by hand",
)


def test_the_readmes_table(monkeypatch):
    monkeypatch.setattr(tables, "README_TOKENS", (1, 4, 8))
    assert tables.to_readme(_record(), [ELSEWHERE]).splitlines() == [
        "| T | floor | output_major | expert_major | vLLM 0.33 * | best plain XLA | error |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 1 | 25.0 | **40.0** | 50.0 | 45.0 | 100.0 | 1.70e-3 |",
        "| 4 | 100.0 | 160.0 | **120.0** | 130.0 | 360.0 | 1.70e-3 |",
        "| 8 | - | - | - | - | - | - |",
        "",
        "output_major, expert_major, xla_gather, xla_dense: NVIDIA H100 80GB HBM3, jax 0.11.2, "
        "commit abcdef0, 2026-11-22. Read ceiling 3.00 TB/s.",
        "expert_major: NVIDIA H100 80GB HBM3, jax 0.11.2, commit later, 2026-11-28. Read ceiling "
        "3.00 TB/s.",
        "\\* Measured elsewhere, on a card of the same kind, its grouping of tokens left out; its "
        "error is 3.8e-3 to 4.1e-3.",
    ]
    assert "| 1 | 25.0 | **40.0** | 50.0 | - |" in tables.to_readme(_record(), [])


def test_markdown_has_one_routing_and_says_what_is_of_which_run():
    text = tables.to_markdown(_record(), "uniform", ["chain_us"])
    assert "| output_major | 40.0 | 160.0 |" in text
    assert "relative error |" not in text
    assert "\nexpert_major: NVIDIA H100 80GB HBM3, jax 0.11.2, commit later" in text
    zipf = tables.to_markdown(_record(), "zipf", ["chain_us"])
    assert "| expert_major | 90.0 |" in zipf
    assert "\nNVIDIA H100 80GB HBM3, jax 0.11.2, commit later" in zipf
    assert "us at T = 1, 4; these kernels beside it 41.0 / 121.0. by hand." in (
        tables.elsewhere_line(ELSEWHERE)
    )


def test_a_candidate_whose_bits_differ_stands_out():
    rows = _record().rows[:2]
    rows[0].same_bits_alone, rows[1].same_bits_alone = True, False
    [section] = tables.sections(rows, ["same_bits_alone"])
    assert section.rows == [("output_major", ["yes"]), ("expert_major", ["NO"])]


def test_the_picture_shows_both_layouts_the_best_of_xla_vllm_and_the_floor():
    record = _record()
    record.rows.append(_row("output_major", 8, 3000.0))  # beyond the panel
    figure = plots.figure_of(record.preset, record.of(), [ELSEWHERE])
    ratio, bandwidth, error = figure.axes
    lines = {
        ax: {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in ax.get_lines()}
        for ax in figure.axes
    }
    assert lines[ratio]["output_major"] == {1: 1.6, 4: 1.6, 8: 15.0}
    assert lines[ratio]["expert_major"] == {1: 2.0, 4: 1.2}
    assert lines[ratio]["best plain XLA"] == {1: 4.0, 4: 3.6}
    assert lines[ratio]["vLLM (measured elsewhere)"] == {1: 1.8, 4: 1.3}
    assert set(lines[ratio]["floor: unique bytes read"].values()) == {1}
    assert ratio.get_yscale() == "linear" and ratio.get_ylim()[1] < 15
    assert "15.0 at 8" in [text.get_text() for text in ratio.texts]
    assert lines[bandwidth]["vLLM (measured elsewhere)"][1] == pytest.approx(75 / 45)
    assert any("read ceiling 3.00" in text.get_text() for text in bandwidth.texts)
    assert set(lines[error]["bf16's own rounding of the output"].values()) == {1.66e-3}
    assert set(lines[error]["vLLM (measured elsewhere)"].values()) == {3.95e-3}


def test_panels_without_figures_are_left_out(tmp_path):
    on_cpu = dataclasses.replace(RUN, read_ceiling_tbps=None)
    rows = [_row("output_major", 1, None, run=on_cpu)]
    assert len(plots.figure_of("tiny", rows).axes) == 1
    assert plots.figure_of("tiny", [dataclasses.replace(rows[0], rel_error=None)]) is None
    plots.draw(tmp_path / "x.png", records.Record(preset="tiny", rows=rows))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_elsewhere_is_found_by_device_and_preset(monkeypatch, tmp_path):
    [vllm] = records.measured_elsewhere("h100", "qwen3_30b_a3b")
    assert len(vllm.tokens) == len(vllm.us) == len(vllm.beside_us)
    assert records.measured_elsewhere("h100", "tiny") == []
    monkeypatch.setattr(records, "ELSEWHERE", tmp_path / "none.json")
    assert records.measured_elsewhere("h100", "qwen3_30b_a3b") == []


def test_one_record_and_one_picture_a_device_and_preset():
    """What is committed can be read, has rows of every routing that it had, and is small."""
    folder = records.RESULTS / "compare_layouts"
    found = sorted(folder.glob("*.jsonl"))
    assert {path.stem for path in found} == {path.stem for path in folder.glob("*.png")}
    for path in found:
        record = records.read_record(path)
        assert path.stem == f"{record.rows[0].run.device}_{record.preset}"
        assert len({row.key for row in record.rows}) == len(record.rows)
    dumps = [*records.RESULTS.rglob("*.jsonl"), *records.RESULTS.rglob("*.npz")]
    assert [path.name for path in dumps if path.stat().st_size > 100_000] == []


@pytest.mark.parametrize(
    ("kind", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("NVIDIA L40S", "l40s"),
        ("cpu", "cpu"),
    ],
)
def test_device_slug(kind, slug):
    assert device_slug(kind) == slug


def test_a_run_keeps_the_file_of_another_script(tmp_path):
    """decode_speed's rows were lost once, to a train_speed with the same --out."""
    path = tmp_path / "h200_tiny.jsonl"
    row = DecodeRow(run=RUN, kind="decode", batch=1, context=512, steps=16, ms=4.0)
    begun = records.begin_record(path, "tiny", decode_records.KINDS)
    records.write_record(path, begun.updated([row]))
    with pytest.raises(ValueError, match="kind decode, which another script wrote; expected"):
        records.begin_record(path, "tiny", records.KINDS)
    assert records.begin_record(path, "tiny", decode_records.KINDS).rows == []
    assert records.begin_record(path, "tiny", decode_records.KINDS, add=True).rows == [row]
    with pytest.raises(ValueError, match="kind is 'decode'; expected one of run, layout"):
        records.begin_record(path, "tiny", records.KINDS, add=True)
