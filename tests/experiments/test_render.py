"""What the two renderers print of the committed files, and of files that are none."""

import dataclasses

import jax
import pytest

from experiments import render_results, render_tuned
from experiments.bench import records
from pallas_kernels.decode_experts import tuned_tables
from pallas_kernels.decode_experts.tuned_tables import Table, parse

_H100 = tuned_tables.FOLDER / "h100.json"
_RECORD = records.RESULTS / "compare_layouts" / "h100_qwen3_30b_a3b.jsonl"


@pytest.fixture(scope="module")
def h100() -> Table:
    return parse(_H100.read_text(), jax.__version__)


def _entry(table, of, T):
    [entry] = [e for e in table.fastest if (e.of, e.T) == (of, T)]
    return entry


def test_a_floor_is_the_experts_of_the_routings_at_the_ceiling(h100):
    entry = _entry(h100, "qwen3_30b_a3b", 1)
    run = h100.runs[entry.run] | {"read_ceiling_tbps": 2.0}
    # One token has K distinct experts, whichever they are.
    bytes_read = entry.shapes.K * 3 * entry.shapes.H * entry.shapes.I * 2
    assert render_tuned.entry_floor_us(entry, run) == pytest.approx(bytes_read / 2e6)


def test_a_shard_reads_its_share(h100):
    whole, half = (
        _entry(h100, of, 64) for of in ("qwen3_235b_a22b", "qwen3_235b_a22b, expert shard 1/2")
    )
    run = h100.runs[whole.run]
    floor = render_tuned.entry_floor_us(whole, run)
    assert render_tuned.entry_floor_us(half, run) == pytest.approx(floor / 2, rel=0.02)


def test_within_or_not(h100):
    entry = _entry(h100, "qwen3_30b_a3b", 8)
    floor = render_tuned.entry_floor_us(entry, h100.runs[entry.run])
    for over, within in ((6.9, "yes"), (7.1, "no")):
        entries = [dataclasses.replace(entry, us=floor + over)]
        text = render_tuned.table_to_markdown(dataclasses.replace(h100, fastest=entries))
        assert [cell.strip() for cell in text.splitlines()[-1].split("|")][10] == within


def test_what_has_no_floor_is_an_error_and_what_is_not_invariant_a_dash(h100):
    entry = _entry(h100, "qwen3_30b_a3b", 8)
    run = h100.runs[entry.run]
    with pytest.raises(ValueError, match="of is 'mine'; expected one of"):
        render_tuned.entry_floor_us(dataclasses.replace(entry, of="mine"), run)
    with pytest.raises(ValueError, match="read_ceiling_tbps is missing"):
        render_tuned.entry_floor_us(entry, run | {"read_ceiling_tbps": None})
    alone = dataclasses.replace(h100, fastest=[entry], invariant=[])
    assert render_tuned.table_to_markdown(alone).splitlines()[-1].split("|")[7].strip() == "-"


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_the_committed_page_is_what_it_prints(device, capsys):
    render_tuned.run([str(_H100.with_stem(device))])
    page = (records.RESULTS / "tune" / f"{device}.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert f"experiments.render_tuned pallas_kernels/decode_experts/data/{device}.json" in page


def test_a_record_as_the_readmes_table_and_in_full(tmp_path, capsys):
    path = tmp_path / _RECORD.name
    path.write_text(_RECORD.read_text())
    render_results.run([str(path), "--table=readme", "--noplot"])
    assert capsys.readouterr().out.startswith("| T | floor | output_major | expert_major | vLLM")
    assert not path.with_suffix(".png").exists()
    render_results.run([str(path), "--metrics=chain_us"])
    printed = capsys.readouterr().out
    assert printed.count("**chain, us**") == len(records.read_record(path).routings())
    assert "vllm, measured elsewhere: 35.6 /" in printed
    assert path.with_suffix(".png").exists()
    render_results.run([str(path), "--metrics=chain_us", "--routing=zipf", "--noplot"])
    assert capsys.readouterr().out.count("**chain, us**") == 1


def test_a_pages_tables_are_made_anew(tmp_path):
    end = "<!-- end of results:compare_layouts -->"
    readme = f"a\n<!-- results:compare_layouts -->\nold\n{end}\nb\n"
    zipf = f"<!-- results:compare_layouts/{_RECORD.stem} zipf chain_us -->\nold\n{end}\n"
    other = zipf.replace(_RECORD.stem, "another")
    page = tmp_path / "page.md"
    page.write_text(readme + zipf + other)
    render_results.run([str(_RECORD), f"--into={page}", "--noplot"])
    made = page.read_text()
    assert made.startswith("a\n<!-- results:compare_layouts -->\n| T | floor | output_major |")
    assert (
        f"{end}\nb\n<!-- results:compare_layouts/{_RECORD.stem} zipf chain_us -->\n|  | T" in made
    )
    assert made.endswith(other) and made.count("old") == 1
    for text, message in [
        (other, "--into has a page without a table of h100"),
        (zipf.replace("zipf", "odd"), "a page's table of h100.* has 'odd'; it has uniform, zipf"),
    ]:
        page.write_text(text)
        with pytest.raises(SystemExit, match=message):
            render_results.run([str(_RECORD), f"--into={page}", "--noplot"])


@pytest.mark.parametrize("module", [render_tuned, render_results])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "is not JSON"), ("[]", "holds a list|kind is None")],
)
def test_a_file_that_is_none_ends_in_one_line(module, content, message, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message) as stopped:
        module.run([str(path)])
    assert str(stopped.value).startswith(module.__name__.rpartition(".")[2] + ": ")
    assert str(path) in str(stopped.value)
    with pytest.raises(SystemExit, match="one argument"):
        module.run([])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--table=small", "--table is 'small'; expected one of full, readme"),
        ("--metrics=speed", "--metrics has 'speed'; expected one of chain_us"),
        ("--routing=odd", "--routing has 'odd'; .* has uniform, zipf"),
    ],
)
def test_wrong_flags_are_named(flag, message):
    with pytest.raises(SystemExit, match=f"render_results: {message}"):
        render_results.run([str(_RECORD), flag, "--noplot"])


def test_a_record_without_rows_says_so(tmp_path):
    path = tmp_path / "x.jsonl"
    records.write_record(path, records.Record(preset="tiny", rows=[]))
    with pytest.raises(SystemExit, match="holds no measurement"):
        render_results.run([str(path)])
