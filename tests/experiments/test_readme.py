"""README's table is the committed record, to the letter."""

import pathlib
import re

from experiments.bench import records, tables

ROOT = pathlib.Path(__file__).parents[2]
RECORD = records.RESULTS / "compare_layouts" / "h100_qwen3_30b_a3b.jsonl"


def test_readme_shows_the_committed_record():
    """`python -m experiments.render_results RECORD --table=readme` prints the block."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(
        r"<!-- results:compare_layouts -->\n(.*)\n<!-- end of results:compare_layouts -->",
        readme,
        re.DOTALL,
    )
    record = records.read(RECORD)
    elsewhere = records.measured_elsewhere("h100", record.preset)
    assert block[1].strip() == tables.to_readme(record, elsewhere).strip()
    assert f"({RECORD.with_suffix('.png').relative_to(ROOT)})" in readme
