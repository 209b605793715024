import dataclasses
import pathlib
import re

import jax
import pytest

from experiments import render_tuned
from experiments.tuning import floors
from pallas_kernels.decode_experts import tuned_tables
from pallas_kernels.decode_experts.tuned_tables import Table, parse

_H100 = tuned_tables.FOLDER / "h100.json"


def _h100() -> Table:
    return parse(_H100.read_text(), jax.__version__)


def test_a_floor_is_the_experts_of_the_routings_at_the_ceiling():
    table = _h100()
    [entry] = [e for e in table.fastest if e.of == "qwen3_30b_a3b" and e.T == 1]
    run = table.runs[entry.run] | {"read_ceiling_tbps": 2.0}
    # One token has K distinct experts, whichever they are.
    bytes_read = entry.shapes.K * 3 * entry.shapes.H * entry.shapes.I * 2
    assert floors.floor_us(entry, run) == pytest.approx(bytes_read / 2e6)


def test_a_shard_reads_its_share():
    table = _h100()
    whole, half = (
        next(e for e in table.fastest if e.of == of and e.T == 64)
        for of in ("qwen3_235b_a22b", "qwen3_235b_a22b, expert shard 1/2")
    )
    run = table.runs[whole.run]
    assert floors.floor_us(half, run) == pytest.approx(floors.floor_us(whole, run) / 2, rel=0.02)


def test_within_or_not():
    table = _h100()
    [entry] = [e for e in table.fastest if e.of == "qwen3_30b_a3b" and e.T == 8]
    floor = floors.floor_us(entry, table.runs[entry.run])
    for over, within in ((6.9, "yes"), (7.1, "no")):
        entries = [dataclasses.replace(entry, us=floor + over)]
        line = floors.to_markdown(dataclasses.replace(table, fastest=entries)).splitlines()[-1]
        assert [cell.strip() for cell in line.split("|")][9] == within


def test_what_has_no_floor_is_an_error_and_what_is_not_invariant_a_dash():
    table = _h100()
    [entry] = [e for e in table.fastest if e.of == "qwen3_30b_a3b" and e.T == 8]
    run = table.runs[entry.run]
    with pytest.raises(ValueError, match="of is 'mine'; expected one of"):
        floors.floor_us(dataclasses.replace(entry, of="mine"), run)
    with pytest.raises(ValueError, match="read_ceiling_tbps is missing"):
        floors.floor_us(entry, run | {"read_ceiling_tbps": None})
    alone = dataclasses.replace(table, fastest=[entry], invariant=[])
    assert floors.to_markdown(alone).splitlines()[-1].split("|")[6].strip() == "-"


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_the_committed_page_is_what_it_prints(device, capsys):
    render_tuned.main(["render_tuned", str(_H100.with_stem(device))])
    page = (pathlib.Path(__file__).parents[2] / "results" / "tune" / f"{device}.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert f"experiments.render_tuned pallas_kernels/decode_experts/data/{device}.json" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "it is not JSON"), ("[]", "holds a list")],
)
def test_a_file_that_is_no_table(content, message, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(f"render_tuned: {path}: ") + f".*{message}"):
        render_tuned.main(["render_tuned", str(path)])
    with pytest.raises(SystemExit, match="one argument"):
        render_tuned.main(["render_tuned"])
