"""Which entry serves a call, what is said where there is none, and what becomes of bad tables."""

import copy
import dataclasses
import json
import logging
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import LAYOUTS, choose_layout, decode_experts, tuned_tables
from pallas_kernels.decode_experts.tuned_tables import BUCKETS, TableError, parse, to_text
from tests.pallas_kernels.decode_experts.cases import Size, assert_same_bits, make_case
from tests.pallas_kernels.decode_experts.tuned_cases import (
    DEVICE,
    SHAPES,
    make_row,
    make_table,
    write_table,
)
from tests.pallas_kernels.machine import INTERPRET, ON_GPU


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are looked for during the test."""
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    monkeypatch.setattr(sys.modules[choose_layout.__module__], "_said", set())
    tuned_tables.forget()
    yield tmp_path
    tuned_tables.forget()


# --- which entry serves a call


def test_the_smallest_measured_bucket_not_below_T_serves_it(folder):
    write_table(folder, make_table([make_row(T, us=float(T)) for T in BUCKETS]))
    served = {
        T: tuned_tables.find(DEVICE, SHAPES, T, invariant=False).entry.T for T in range(1, 129)
    }
    assert served == {T: min(bucket for bucket in BUCKETS if bucket >= T) for T in served}


def test_a_bucket_that_was_not_measured_is_served_by_the_next(folder):
    write_table(folder, make_table([make_row(T) for T in (1, 8, 64)]))
    served = [
        tuned_tables.find(DEVICE, SHAPES, T, invariant=False).entry for T in (1, 2, 8, 9, 64, 65)
    ]
    assert [entry and entry.T for entry in served] == [1, 8, 8, 64, 64, None]


def test_beyond_the_largest_invariant_keeps_its_order_of_sums(folder):
    rows = [make_row(1, gate_up_num_stages=2), make_row(8, down_block_m=64)]
    write_table(folder, make_table(rows, rows))
    assert choose_layout(DEVICE, SHAPES, 8, "invariant").config.down_block_m == 64
    # Rings that won with few tokens need not with many.
    chosen = choose_layout(DEVICE, SHAPES, 1000, "invariant")
    assert (chosen.layout, chosen.config) == ("expert_major", None)
    assert choose_layout(DEVICE, SHAPES, 1000).config is None


def test_the_table_goes_before_the_heuristic(folder):
    assert choose_layout(DEVICE, SHAPES, 1).layout == "output_major"
    tuned_tables.forget()
    write_table(folder, make_table([make_row(1, us=31.8, down_num_stages=2)], [make_row(1)]))
    chosen = choose_layout(DEVICE, SHAPES, 1)
    assert (chosen.layout, chosen.config.down_num_stages) == ("expert_major", 2)
    assert "31.8 us at T = 1 (h100.json)" in chosen.why
    assert "one order of sums" in choose_layout(DEVICE, SHAPES, 1, "invariant").why


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"mode is 'fast'; expected one of .'auto', 'invariant'.*"):
        choose_layout(DEVICE, SHAPES, 1, "fast")


def test_a_table_is_read_once(folder):
    write_table(folder, make_table([make_row(1)]))
    assert choose_layout(DEVICE, SHAPES, 1).layout == "expert_major"
    write_table(folder, "{")
    assert choose_layout(DEVICE, SHAPES, 1).layout == "expert_major"


# --- the heuristic, said once


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("NVIDIA A100-SXM4-80GB", "there is no table for NVIDIA A100-SXM4-80GB"),
        ("NVIDIA H100 PCIe", "was measured on NVIDIA H100 80GB HBM3, not on NVIDIA H100 PCIe"),
        (DEVICE, "h100.json has no entry for ExpertShapes"),
    ],
)
def test_a_device_or_shape_without_entry_is_said_once(folder, caplog, device, why):
    write_table(folder, make_table([make_row(1) | {"H": 256}]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for T in (1, 2, 1, 64):
            for mode in ("auto", "invariant"):
                assert choose_layout(device, SHAPES, T, mode).config is None
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert why in caplog.text
    other = SHAPES.__class__(E=8, K=2, H=128, I=128)
    choose_layout(device, other, 1)
    assert len(caplog.records) == 2


def test_a_cpu_is_not_warned_of_its_speed(folder, caplog):
    choose_layout("cpu", SHAPES, 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- corrupt and stale tables


def test_what_older_tables_leave_out():
    older = make_table([make_row(1)])
    expected = parse(json.dumps(older), jax.__version__).fastest
    del older["fastest"][0]["weights"], older["fastest"][0]["config"]["gate_up_neurons"]
    assert parse(json.dumps(older), jax.__version__).fastest == expected


def test_each_format_of_weights_has_entries_of_its_own(folder):
    write_table(folder, make_table([make_row(1), make_row(1, us=30.0, weights="fp8")]))
    fp8 = dataclasses.replace(SHAPES, weights="fp8")
    times = [tuned_tables.find(DEVICE, of, 1, invariant=False).entry.us for of in (SHAPES, fp8)]
    assert times == [50.0, 30.0]


def _changed(path: str, value):
    """A sound table with the field at `path` (keys by dots) set to value, or taken out if None."""
    table = copy.deepcopy(make_table([make_row(1)], [make_row(1)]))
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    at = table
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return table


BAD = {
    "empty": ("", "it is not JSON"),
    "cut off": ('{"format": 2, "fastest": [', "it is not JSON"),
    "a list": ("[]", "holds a list; expected an object"),
    "deep": ("[" * 100_000, "it is not JSON"),
    "older format": (_changed("format", 0), "its format is 0; expected 2"),
    "no format": (_changed("format", None), "its format is None; expected 2"),
    "older jax": (_changed("jax", "0.1.0"), "measured with jax '0.1.0' and this is "),
    "no runs": (_changed("runs", None), "the table lacks runs"),
    "runs": (_changed("runs", {}), "runs is {}; expected list"),
    "unknown field": (_changed("slowest", []), "the table has unknown fields 'slowest'"),
    "fastest": (_changed("fastest", "all"), "fastest is 'all'; expected list"),
    "entry": (_changed("fastest.0", 3), r"fastest\[0\]: the entry is 3; expected dict"),
    "size": (_changed("fastest.0.H", "128"), r"fastest\[0\]: H is '128'; expected int"),
    "bool": (_changed("fastest.0.K", True), "K is True; expected int"),
    "zero": (_changed("fastest.0.E", 0), "E is 0; expected at least 1"),
    "no size": (_changed("fastest.0.I", None), "the entry lacks I"),
    "weights": (_changed("fastest.0.weights", "int4"), "weights is 'int4'; expected one of"),
    "bucket": (_changed("fastest.0.T", 3), r"T is 3; expected one of \(1, 2, 4"),
    "us": (_changed("fastest.0.us", float("nan")), "us is nan; expected a positive number"),
    "error": (_changed("fastest.0.rel_error", "low"), "rel_error is 'low'; expected float"),
    "run": (_changed("fastest.0.run", 1), "run is 1; expected an index into 1 run"),
    "layout": (_changed("fastest.0.layout", "row_major"), "layout is 'row_major'; expected one of"),
    "layout's type": (_changed("fastest.0.layout", ["x"]), r"layout is \['x'\]; expected one of"),
    "config": (_changed("invariant.0.config", 1), r"invariant\[0\]: config is 1; expected dict"),
    "config field": (_changed("fastest.0.config.warps", 4), "config has unknown fields 'warps'"),
    "missing field": (_changed("fastest.0.config.down_block_m", None), "config lacks down_block_m"),
    "field's type": (
        _changed("fastest.0.config.down_block_m", 64.0),
        "config.down_block_m is 64.0; expected int",
    ),
    "refused": (
        _changed("fastest.0.config.down_block_m", 48),
        "expert_major refuses its config .*config.down_block_m is 48; expected one of",
    ),
    "twice": (make_table([make_row(1), make_row(1)]), "two entries of the same sizes and T"),
    "two orders": (
        make_table([], [make_row(1, "output_major"), make_row(8)]),
        "invariant has different orders of sums",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_ignored_with_one_warning(folder, name):
    table, reason = BAD[name]
    write_table(folder, table)
    with pytest.warns(UserWarning, match=reason) as caught:
        for T in (1, 8, 64, 1):
            for mode in ("auto", "invariant"):
                assert choose_layout(DEVICE, SHAPES, T, mode).config is None
    assert len(caught) == 1
    assert str(folder / "h100.json") in str(caught[0].message)


def test_bytes_that_are_no_text_are_ignored(folder):
    (folder / "h100.json").write_bytes(b"\xff\xfe{}")
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose_layout(DEVICE, SHAPES, 1).config is None


def test_text_and_back():
    rows = [make_row(8), make_row(1, "output_major", 31.25)]
    table = parse(to_text_of(make_table(rows, [make_row(1)])), jax.__version__)
    assert [entry.T for entry in table.fastest] == [1, 8]
    assert parse(to_text(table), jax.__version__) == table
    assert max(map(len, to_text(table).splitlines())) < 400
    with pytest.raises(TableError, match="tune again"):
        parse(to_text(table), "9.9.9")


def to_text_of(value: dict) -> str:
    return to_text(parse(json.dumps(value), jax.__version__))


# --- what runs

# On a CPU few enough tokens for the narrowest tiles at every T: a CPU adds up a product of another
# width in another order.
SIZE = Size(T=33 if ON_GPU else 5, E=SHAPES.E, K=SHAPES.K, H=SHAPES.H, I=SHAPES.I)


@pytest.fixture
def on_this_device(folder):
    """write(table): the table of the device that the test runs on."""
    device = jax.devices()[0].device_kind

    def write(fastest, invariant=()):
        table = make_table(fastest, invariant, device_kind=device)
        write_table(folder, table, f"{tuned_tables.device_slug(device)}.json")
        tuned_tables.forget()

    return write


def _run(case, **keywords):
    keywords = {"out_dtype": jnp.float32, "interpret": INTERPRET} | keywords
    return decode_experts(*case, **keywords)


def test_auto_runs_the_layout_and_config_of_the_table(on_this_device, seed):
    case = make_case(SIZE._replace(T=1), seed)
    for layout, field, value in (
        ("output_major", "gate_up_block_k", 64),
        ("expert_major", "down_block_k", 64),
    ):
        on_this_device([make_row(1, layout, **{field: value})])
        config = LAYOUTS[layout].Config(**make_row(1, layout, **{field: value})["config"])
        assert config != LAYOUTS[layout].default_config(SHAPES, 1)
        assert_same_bits(_run(case), _run(case, layout=layout, config=config))


def test_a_callers_config_goes_before_the_tables(on_this_device, seed):
    case = make_case(SIZE._replace(T=1), seed)
    on_this_device([make_row(1, "expert_major", down_block_k=64)])
    default = LAYOUTS["expert_major"].default_config(SHAPES, 1)
    assert_same_bits(_run(case, config=default), _run(case, layout="expert_major"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_invariant_gives_a_token_the_same_bits_at_every_T(on_this_device, layout, seed):
    """Ring lengths change with T, as a table may have them, and the layouts of "auto" do too."""
    default = LAYOUTS[layout].default_config(SHAPES, 1)
    shorter = {name: value - 1 for name, value in vars(default).items() if name.endswith("stages")}
    orders = {name: kernel.sum_order for name, kernel in LAYOUTS.items()}
    other = next(name for name in LAYOUTS if orders[name] != orders[layout])
    on_this_device(
        [make_row(1, other), make_row(2, layout), make_row(8, layout)],
        [make_row(1, layout), make_row(2, layout, **shorter), make_row(8, layout)],
    )
    case = make_case(SIZE, seed)
    expected = _run(case, layout="invariant")
    assert_same_bits(expected, _run(case, layout=layout))
    for T in (1, 2, 3) if ON_GPU else (1, 2):
        for start in range(0, SIZE.T - T + 1, 3):
            some = slice(start, start + T)
            assert_same_bits(_run(case.tokens(some), layout="invariant"), expected[some])
    # The table's "auto" takes another layout at T = 1, and with it other bits.
    first = case.tokens(slice(0, 1))
    assert jnp.any(_run(first) != expected[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_config_changes_a_bit(layout, seed):
    size = Size(T=3 if ON_GPU else 1, E=4, K=2, H=256, I=256)
    case = make_case(size, seed)
    kernel = LAYOUTS[layout]
    default = kernel.default_config(size.shapes, size.T)
    expected = _run(case, layout=layout)
    if ON_GPU:
        others = kernel.candidates(size.shapes, size.T)[1:]
    else:  # A CPU adds up a product of another width in another order: there only stages are free.
        stages = [name for name in vars(default) if name.endswith("stages")]
        fewer = {name: getattr(default, name) - 1 for name in stages}
        others = [dataclasses.replace(default, **fewer)]
    assert others
    for config in others:
        assert_same_bits(_run(case, layout=layout, config=config), expected)
