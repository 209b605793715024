"""The result file has the schema that others read, and the table says what is in it."""

import json
import pathlib

import pytest

from experiments.compare import environment, plot, records, report

ENVIRONMENT = records.Environment(
    device="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    jax="0.11.2",
    jaxlib="0.11.2",
    driver="580.1",
    python="3.12.1",
    commit="abc",
    command="python -m experiments.compare_layouts",
    date="2026-11-22T00:00:00+00:00",
    seed=0,
    repeats=20,
    read_ceiling_tbps=3.0,
)
MEASUREMENT_FIELDS = (
    "kind name preset tokens routing dtype chain_us chain_us_spread device_us unique_experts "
    "unique_bytes requested_bytes unique_tbps requested_tbps ceiling_share rel_error "
    "rel_error_before_rounding max_error same_bits_repeated same_bits_alone backend config"
)
ENVIRONMENT_FIELDS = (
    "kind device device_kind jax jaxlib driver python commit command date seed repeats "
    "read_ceiling_tbps"
)


def _measurement(name, T, chain_us, kind="layout", **fields):
    measurement = records.Measurement(
        kind=kind,
        name=name,
        preset="qwen3_30b_a3b",
        tokens=T,
        routing="uniform",
        dtype="bf16",
        unique_experts=8.0 * T,
        unique_bytes=75e6 * T,
        requested_bytes=90e6 * T,
        rel_error=1.7e-3,
        **fields,
    )
    if chain_us is not None:
        measurement.set_chain(chain_us, 0.5, ENVIRONMENT.read_ceiling_tbps)
    return measurement


def _run():
    return [
        _measurement("output_major", 1, 40.0),
        _measurement("expert_major", 1, 50.0, rel_error_before_rounding=2e-6),
        _measurement("xla_gather", 1, 100.0, kind="baseline"),
        _measurement("output_major", 4, 160.0),
        _measurement("expert_major", 4, 120.0),
        _measurement("xla_gather", 4, None, kind="baseline", config={"error": "it broke"}),
    ]


def test_lines_have_exactly_the_schema(tmp_path):
    path = tmp_path / "results" / "h100_x.jsonl"
    records.write(path, ENVIRONMENT, _run())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert " ".join(lines[0]) == ENVIRONMENT_FIELDS
    assert all(" ".join(line) == MEASUREMENT_FIELDS for line in lines[1:])
    assert lines[1]["device_us"] is None


def test_round_trip(tmp_path):
    path = tmp_path / "x.jsonl"
    records.write(path, ENVIRONMENT, _run())
    found_environment, found = records.read(path)
    assert found_environment == ENVIRONMENT
    for record, written in zip(found, _run(), strict=True):
        for field in MEASUREMENT_FIELDS.split():  # floats are kept to 7 digits
            value = getattr(written, field)
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert getattr(record, field) == expected


def test_a_write_that_breaks_off_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    records.write(path, ENVIRONMENT, _run())
    before = path.read_text()

    def half(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        records.write(path, ENVIRONMENT, _run()[:1])
    assert path.read_text() == before


def test_what_follows_from_a_chain_time():
    measurement = _measurement("output_major", 1, 50.0)
    assert measurement.unique_tbps == pytest.approx(1.5)
    assert measurement.requested_tbps == pytest.approx(1.8)
    assert measurement.ceiling_share == pytest.approx(0.5)


def test_values_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "x.jsonl"
    records.write(path, ENVIRONMENT, [_measurement("a", 1, None, max_error=float("inf"))])
    assert records.read(path)[1][0].max_error is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ('{"kind": "layout"}', "expected environment on line 1"),
        ('{"kind": "environment"}', r"missing or unknown fields \['command'"),
        ("[1]", "kind is None"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_sections():
    tokens, sections = report.sections(ENVIRONMENT, _run())
    assert tokens == [1, 4]
    by_title = {section.title: dict(section.rows) for section in sections}
    chain = by_title["chain, us"]
    assert chain["floor: unique bytes"] == ["25.0", "100.0"]
    assert chain["xla_gather"] == ["100.0", "failed"]
    assert by_title["times faster than the best baseline"]["output_major"] == ["2.50", "-"]
    assert by_title["relative error before rounding"] == {"expert_major": ["2.00e-06", "-"]}
    assert "device, us" not in by_title


def test_crossover_and_remarks():
    assert report.crossovers(_run()) == [report.Crossover(1, 4, "output_major", "expert_major")]
    text = "\n".join(report.remarks(ENVIRONMENT, _run()))
    assert "output_major is the fastest layout up to T = 1, expert_major from T = 4 on." in text
    assert "1.60 at T = 1, 1.20 at T = 4" in text
    assert "xla_gather error: it broke (T = 4)" in text


def test_a_mode_goes_by_the_layout_that_it_took():
    run = [
        _measurement("auto", 1, 40.0, config={"layout": "output_major"}),
        _measurement("invariant", 1, 50.0, config={"layout": "expert_major"}),
        _measurement("auto", 4, 125.0, config={"layout": "expert_major"}),
        _measurement("invariant", 4, 120.0, config={"layout": "expert_major"}),
    ]
    assert report.crossovers(run) == [report.Crossover(1, 4, "output_major", "expert_major")]
    text = "\n".join(report.remarks(ENVIRONMENT, run))
    assert "auto takes output_major at T = 1; expert_major at T = 4." in text
    assert "invariant takes expert_major at T = 1, 4." in text
    assert report.crossovers(run[2:]) == []


def test_markdown_and_picture(tmp_path):
    text = report.to_markdown(ENVIRONMENT, _run(), ["chain_us"])
    assert "| output_major | 40.0 | 160.0 |" in text
    assert "relative error" not in text
    plot.draw(tmp_path / "x.png", ENVIRONMENT, _run())
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


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
    assert environment.device_slug(kind) == slug


def test_a_candidate_whose_bits_differ_stands_out():
    measurements = _run()
    measurements[0].same_bits_alone, measurements[1].same_bits_alone = True, False
    lines = report.to_markdown(ENVIRONMENT, measurements, ["same_bits_alone"]).splitlines()
    assert "| **a token's bits the same in any batch** |  |  |" in lines
    assert "| output_major | yes | - |" in lines
    assert "| expert_major | NO | - |" in lines


def test_files_from_before_the_bits_were_compared_are_read(tmp_path):
    path = tmp_path / "old.jsonl"
    records.write(path, ENVIRONMENT, _run()[:1])
    path.write_text(path.read_text().replace('"same_bits_alone": null, ', ""))
    assert records.read(path)[1][0].same_bits_alone is None
