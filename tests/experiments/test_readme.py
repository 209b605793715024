"""The tables of README and docs/benchmarks.md are the committed records, to the letter."""

import pathlib

import pytest

from experiments import render_results
from experiments.bench import records

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
