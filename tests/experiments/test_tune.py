"""The script: its flags' errors, the order of work, budget and resuming; once in interpret mode."""

import functools
import sys
import types
import weakref

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments.compare import output
from experiments.tuning import bench, run, settings, sweep
from experiments.tuning.store import Store
from experiments.tuning.sweep import candidates
from experiments.tuning.work import draw_routings, layers_of, useful_first
from pallas_kernels.decode_experts import reference_experts, tuned_tables
from pallas_kernels.decode_experts.tuned_tables import BUCKETS, parse
from tests.experiments.fake_bench import FakeBench

# A registry of the script's own: the scripts share names of flags, which one registry refuses.
FLAGS = flags.FlagValues()
with pytest.MonkeyPatch.context() as patch:
    for kind in ("string", "list", "integer", "float", "bool"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=FLAGS)
        patch.setattr(flags, f"DEFINE_{kind}", define)
    from experiments import tune

on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what a machine without GPU does"
)

ASKED = {
    "preset": ["tiny"],
    "tokens": ["1", "8", "2"],
    "layouts": ["output_major", "expert_major"],
    "expert_shards": [],
    "tensor_shards": [],
    "most_configs": 0,
    "routing": "uniform",
    "rounds": 2,
    "repeats": 2,
    "seed": 0,
    "budget_s": 0,
    "compile_threads": 1,
    "again": False,
    "interpret": False,
    "out": "out/tune",
    "records": "out/tune",
    "commit": "abc",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": ["gpt"]}, "--preset has 'gpt'; expected one of tiny"),
        ({"preset": []}, "--preset is empty"),
        ({"layouts": ["row_major"]}, "--layouts has 'row_major'; expected one of output_major"),
        ({"layouts": []}, "--layouts is empty"),
        ({"tokens": ["3"]}, "--tokens has '3'; expected the table's buckets: 1, 2, 4"),
        ({"tokens": ["one"]}, "--tokens has 'one'"),
        ({"tokens": []}, "--tokens is empty; expected some of 1, 2, 4"),
        ({"expert_shards": ["1"]}, "--expert_shards has '1'; expected whole numbers from 2"),
        ({"expert_shards": ["3"]}, "--expert_shards has 3: E = 8 of tiny makes shards of 2.66"),
        ({"expert_shards": ["8"]}, "shards of 1 experts; expected a whole number, at least K = 2"),
        (
            {"preset": ["qwen3_30b_a3b"], "tensor_shards": ["8"]},
            "--tensor_shards has 8: I = 768 of qwen3_30b_a3b makes shards of 96 neurons; "
            "expected a multiple of 64",
        ),
        ({"routing": "normal"}, "--routing is 'normal'"),
        ({"rounds": 0}, "--rounds is 0; expected 1 to"),
        ({"repeats": 0}, "--repeats is 0; expected 1 to"),
        ({"seed": -1}, "--seed is -1"),
        ({"budget_s": -1.0}, "--budget_s is -1.0"),
        ({"most_configs": -1}, "--most_configs is -1"),
        ({"compile_threads": 0}, "--compile_threads is 0"),
        ({"records": ""}, "--records is empty"),
        ({"out": __file__}, "--out is .*; expected a folder to write to"),
        (
            {"interpret": True, "out": str(tuned_tables.FOLDER)},
            "--out is .*; expected another folder than the shipped tables' with --interpret",
        ),
    ],
)
def test_flag_errors_name_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(**ASKED | changes)


def test_tables_go_into_the_ops_folder_unless_interpreted(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(settings, "DEFAULT_RECORDS", str(tmp_path / "out"))
    assert settings.parse(**ASKED | {"out": ""}).out == tmp_path / "data"
    asked = settings.parse(**ASKED | {"out": "", "interpret": True, "tokens": ["1", "64"]})
    assert asked.out == tmp_path / "out"
    assert asked.tokens == (1,)
    assert [layer.of for layer in asked.layers] == ["tiny"]


def test_whole_layers_come_before_shards_and_useful_batches_first():
    layers = layers_of(("qwen3_235b_a22b", "qwen3_coder_480b"), (2, 8), (4,))
    assert [layer.of for layer in layers[:3]] == [
        "qwen3_235b_a22b",
        "qwen3_coder_480b",
        "qwen3_235b_a22b, expert shard 1/2",
    ]
    assert [(layer.shapes.E, layer.shapes.I, layer.all_experts) for layer in layers[2:5]] == [
        (64, 1536, 128),
        (16, 1536, 128),
        (128, 384, 128),
    ]
    assert useful_first(BUCKETS)[:3] == [1, 8, 64]
    assert sorted(useful_first(BUCKETS)) == list(BUCKETS)
    assert useful_first((2, 64)) == [64, 2]


def test_a_shard_sees_other_shards_experts_as_padding():
    *_, whole = layers_of(("qwen3_235b_a22b",), (), ())
    shard = layers_of(("qwen3_235b_a22b",), (8,), ())[-1]
    all_ids = np.stack([r.expert_ids for r in draw_routings(whole, "uniform", 8, 16, 0)])
    ids = np.stack([r.expert_ids for r in draw_routings(shard, "uniform", 8, 16, 0)])
    np.testing.assert_array_equal(ids, np.where(all_ids < 16, all_ids, -1))
    assert 0.5 < (ids >= 0).sum() / (16 * 8) < 1.5  # K / n = 1 a token


@pytest.fixture
def tune_with(tmp_path):
    """A function of a bench and changed flags: (what is missing, the store, what was said)."""

    def tune_(fake, deadline=None, opened=None, **changes):
        asked = settings.parse(**ASKED | {"out": str(tmp_path), "records": str(tmp_path)} | changes)
        record = {"device_kind": "made up", "jax": jax.__version__}
        log = tmp_path / "log"
        with log.open("w") as file, output.progress(Console(file=file, width=200)) as bar:
            store = Store(asked.out, asked.records, "made up", record, bar.say)

            def bench_of(layer):
                if opened is not None:
                    opened.append(layer.of)
                return lambda T: fake if isinstance(fake, FakeBench) else fake()

            missing = run.tune(asked, store, bench_of, bar, deadline)
        return missing, store, log.read_text()

    return tune_


def test_a_run_fills_the_table_and_the_next_one_skips_what_is_there(tune_with):
    bench, opened = FakeBench(), []
    missing, store, said = tune_with(bench, opened=opened)
    assert missing == []
    assert opened == ["tiny"]
    assert "tiny, T = 1: 10.0 us by output_major(" in said
    table = parse(store.path.read_text(), jax.__version__)
    assert [e.T for e in table.fastest] == [e.T for e in table.invariant] == [1, 2, 8]

    resumed, opened = FakeBench(), []
    missing, _, said = tune_with(resumed, opened=opened)
    assert (missing, resumed.built, opened) == ([], [], [])  # not even weights are made
    assert said.count("in the table already") == 3

    more, opened = FakeBench(us=lambda candidate, count: 5.0), []
    _, store, said = tune_with(more, opened=opened, tokens=["1", "16"])
    assert said.count("in the table already") == 1
    assert {e.T: e.us for e in store.table().fastest} == {1: 10.0, 2: 10.0, 8: 10.0, 16: 5.0}

    _, store, _ = tune_with(more, again=True, tokens=["1"])
    assert {e.T: e.us for e in store.table().fastest} == {1: 5.0, 2: 10.0, 8: 10.0, 16: 5.0}


def test_the_budget_stops_it_between_sweeps_and_what_is_done_is_kept(tune_with, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    for module in (run, sweep):
        monkeypatch.setattr(module, "time", clock)

    def us(candidate, count):
        if count == 5:
            clock.now = 2.0
        return 10.0

    bench = FakeBench(us=us)
    missing, store, _ = tune_with(
        bench, deadline=1.0, most_configs=1, layouts=["expert_major"], rounds=4
    )
    # 4 samples are T = 1; the fifth, of T = 8, outlasts the budget.
    assert [e.T for e in store.table().fastest] == [1]
    assert missing == ["tiny, T = 8: out of time", "tiny, T = 2: out of time"]
    missing, store, _ = tune_with(FakeBench())
    assert missing == []
    assert {e.T for e in store.table().fastest} == {1, 2, 8}


def test_a_layers_weights_are_gone_before_the_next_ones_are_made(tune_with):
    alive = weakref.WeakSet()

    class Opened(list):
        def append(self, of):
            assert not alive, "the weights of the layer before are still held"
            super().append(of)

    def make():
        (asked,) = candidates(["output_major"], layers_of(("tiny",), (), ())[0].shapes, 1, 1)
        heavy = FakeBench(broken=(asked,))  # an exception's traceback holds on to its frames
        alive.add(heavy)
        return heavy

    opened = Opened()
    missing, _, _ = tune_with(make, opened=opened, expert_shards=["2", "4"], tokens=["1", "8"])
    assert missing == []
    assert len(opened) == 3


def test_where_nothing_comes_through_it_says_so(tune_with):
    class Broken(FakeBench):
        def build(self, candidate):
            raise ValueError("no such instruction")

    missing, store, said = tune_with(Broken(), tokens=["1"], most_configs=1)
    assert missing == ["tiny, T = 1: no candidate came through"]
    assert said.count("ValueError: no such instruction") == 2
    assert not store.path.exists()


def _run_script(monkeypatch, *arguments):
    argv = ["tune", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    before = flagsaver.save_flag_values(FLAGS)
    try:
        tune.main(FLAGS(argv))
    finally:
        flagsaver.restore_flag_values(before, FLAGS)


@on_a_cpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen3_30b_a3b"], "takes flags only; left over: qwen3_30b_a3b"),
        (["--tokens=5", "--out=out/tune"], "tune: --tokens has '5'"),
        (["--out=out/tune"], "tune: .* 'cpu'; it needs an NVIDIA GPU of the Hopper .*--interpret"),
    ],
)
def test_script_refuses_what_it_cannot_do(monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        _run_script(monkeypatch, *arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_the_real_bench_with_a_layer_that_runs_anywhere(monkeypatch, which):
    """The GPU's way through it, chain and all; the shard has no expert of most tokens."""
    layer = layers_of(("tiny",), (4,), ())[which]

    def anywhere(x, weights, ids, expert_weights, *, layout, config, out_dtype, interpret):
        assert (layout, interpret) == ("expert_major", False)
        return reference_experts(x, weights, ids, expert_weights).astype(out_dtype)

    monkeypatch.setattr(bench, "decode_experts", anywhere)
    said = []
    bench_at_1 = bench.Bench(
        layer,
        bench.make_weights(layer, 0, False),
        1,
        routing="uniform",
        seed=0,
        repeats=3,
        interpret=False,
        say=said.append,
    )
    assert len(bench_at_1.weights) == 4
    (candidate,) = candidates(["expert_major"], layer.shapes, 1, 1)
    trial = bench_at_1.build(candidate)
    assert 0 < trial.check() < 2e-3
    assert trial.sample() > 0
    trial.finish()
    assert "L2 is not cold" in said[0]
    monkeypatch.setattr(
        bench, "decode_experts", lambda *case, **keywords: 1.01 * anywhere(*case, **keywords)
    )
    with pytest.raises(AssertionError, match=r"expert_major\(.*relative error .* is above"):
        bench_at_1.build(candidate).check()


@on_a_cpu
def test_script_in_interpret_mode(tmp_path, monkeypatch, capsys):
    folder = f"--out={tmp_path}", f"--records={tmp_path}"
    arguments = "--interpret", "--tokens=1", "--layouts=expert_major", "--most_configs=1", *folder
    _run_script(monkeypatch, *arguments, "--rounds=1", "--expert_shards=2", "--commit=abc")
    printed = capsys.readouterr().out
    assert "tiny, expert shard 1/2" in printed
    table = parse((tmp_path / "cpu.json").read_text(), jax.__version__)
    assert [e.of for e in table.fastest] == ["tiny, expert shard 1/2", "tiny"]
    (record,) = table.runs
    assert record["interpreted"] is True
    assert record["read_ceiling_tbps"] is None
    assert "--layouts=expert_major" in record["command"]
    assert all(0 < e.rel_error < 2e-3 and e.us > 0 for e in table.fastest)
