"""The tables of README and docs/benchmarks.md are the committed records, to the letter."""

import pathlib

import pytest

from experiments import render_results
from experiments.bench import decode_records, records

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = records.RESULTS / "compare_layouts"


@pytest.mark.parametrize(
    ("page", "stem"),
    [
        ("README.md", render_results.README_RECORD),
        *(("docs/benchmarks.md", path.stem) for path in sorted(FOLDER.glob("*.jsonl"))),
    ],
)
def test_a_page_shows_the_committed_record(page, stem):
    """`python -m experiments.render_results RECORD --into=PAGE` makes its tables."""
    text = (ROOT / page).read_text()
    record = records.read_record(FOLDER / f"{stem}.jsonl")
    elsewhere = records.measured_elsewhere(record.rows[0].run.device, record.preset)
    assert render_results.with_tables(text, stem, record, elsewhere) == text
    assert f"results/compare_layouts/{stem}.png)" in text


@pytest.mark.parametrize("path", sorted((records.RESULTS / "decode_speed").glob("*.jsonl")))
def test_the_benchmarks_show_the_committed_decode_steps(path):
    """`python -m experiments.render_results RECORD --into=docs/benchmarks.md` makes the table."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    record = decode_records.read_record(path)
    assert render_results.with_tables(text, path.stem, record, ()) == text
    assert f"results/decode_speed/{path.stem}.png)" in text
