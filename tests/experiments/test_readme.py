"""README's table is the committed result, to the letter."""

import pathlib
import re

from experiments.compare import records, report

ROOT = pathlib.Path(__file__).parents[2]


def test_readme_shows_the_committed_result():
    readme = (ROOT / "README.md").read_text()
    block = re.search(
        r"<!-- results:compare_layouts -->\n(.*)\n<!-- end of results:compare_layouts -->",
        readme,
        re.DOTALL,
    )
    command = re.search(r"experiments\.render_results (\S+) --metrics=([\w,]+)", readme)
    path, metrics = ROOT / command[1], command[2].split(",")
    assert block[1].strip() == report.to_markdown(*records.read(path), metrics).strip()
    assert f"({path.with_suffix('.png').relative_to(ROOT)})" in readme
    assert path.with_suffix(".png").exists()
