"""The script: its flags' errors, the order of work, budget and resuming; once in interpret mode."""

import dataclasses
import types
import weakref

import jax
import pytest
from rich.console import Console

from experiments import tune
from experiments.bench import candidates, script, tuning_bench, tuning_sweep
from experiments.bench.candidates import configs_to_tune
from experiments.bench.tuning_bench import LayerBench
from experiments.bench.tuning_store import Store
from pallas_kernels.decode_experts import reference_experts, tuned_tables
from pallas_kernels.decode_experts.shapes import SHAPES, shapes_of
from pallas_kernels.decode_experts.tuned_tables import BUCKETS, parse
from tests.experiments.fake_bench import FakeBench

on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what a machine without GPU does"
)


TINY = SHAPES["tiny"]


def asked(*flags):
    defaults = "--preset=tiny --tokens=1,8,2 --rounds=2 --repeats=2 --compile_threads=1"
    return script.parse_settings(tune.Settings, [*defaults.split(), *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset=gpt"], "--preset has 'gpt'; expected one of tiny"),
        (["--preset="], "--preset is empty"),
        (["--layouts=row_major"], "--layouts has 'row_major'; expected one of output_major"),
        (["--layouts="], "--layouts is empty"),
        (["--tokens=3"], "--tokens has 3; expected one of 1, 2, 4"),
        (["--tokens=one"], "--tokens has 'one'; expected one of 1, 2, 4"),
        (["--tokens="], r"--tokens is empty; expected some of \(1, 2, 4"),
        (["--expert_shards=1"], "--expert_shards has 1; expected 2 to"),
        (["--expert_shards=3"], "--expert_shards has 3: E = 8 of tiny makes shards of 2.66"),
        (["--expert_shards=8"], "shards of 1 experts; expected a whole number, at least K = 2"),
        (
            ["--preset=qwen3_30b_a3b", "--tensor_shards=8"],
            "--tensor_shards has 8: I = 768 of qwen3_30b_a3b makes shards of 96 neurons; "
            "expected a multiple of 64",
        ),
        (["--routing=normal"], "routing is 'normal'"),
        (["--rounds=0"], "--rounds is 0; expected 1 to"),
        (["--repeats=0"], "--repeats is 0; expected 1 to"),
        (["--seed=-1"], "--seed is -1"),
        (["--budget_s=-1"], "--budget_s is -1.0"),
        (["--most_configs=-1"], "--most_configs is -1"),
        (["--compile_threads=0"], "--compile_threads is 0"),
        (["--records="], "--records is empty"),
        ([f"--out={__file__}"], "--out is .*; expected a folder to write to"),
        (
            ["--interpret", f"--out={tuned_tables.FOLDER}"],
            "--out is .*; expected another folder than the shipped tables' with --interpret",
        ),
        (["qwen3_30b_a3b"], "takes flags only; left over: qwen3_30b_a3b"),
    ],
)
def test_flag_errors_name_the_flag(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=f"tune: .*{message}"):
        asked(f"--out={tmp_path}", f"--records={tmp_path}", *flags)


def test_tables_go_into_the_ops_folder_unless_interpreted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path / "data")
    assert asked().table_folder == tmp_path / "data"
    settings = asked("--preset=qwen3_30b_a3b", "--interpret", "--tokens=1,64")
    assert str(settings.table_folder) == "out/tune"
    assert settings.batches() == [1]
    assert [layer.of for layer in settings.layers()] == ["tiny"]


def test_whole_layers_come_before_shards_and_useful_batches_first(tmp_path):
    settings = asked(
        "--preset=qwen3_235b_a22b,qwen3_coder_480b",
        "--expert_shards=2,8",
        "--tensor_shards=4",
        f"--tokens={','.join(map(str, BUCKETS))}",
        f"--out={tmp_path}",
    )
    layers = settings.layers()
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
    assert settings.batches()[:3] == [1, 8, 64]
    assert sorted(settings.batches()) == list(BUCKETS)
    assert asked("--tokens=2,64", f"--out={tmp_path}").batches() == [64, 2]


@pytest.fixture
def tune_with(tmp_path, monkeypatch):
    """A function of a bench and changed flags: (what is missing, the store, what was said)."""
    collect = tune.gc.collect

    def tune_(fake, deadline=None, opened=None, collects=False, **changes):
        # It takes a third of a second among the suite's objects.
        monkeypatch.setattr(tune.gc, "collect", collect if collects else lambda: None)
        settings = asked(f"--out={tmp_path}", f"--records={tmp_path}")
        settings = dataclasses.replace(settings, **changes)
        record = {"device_kind": "made up", "jax": jax.__version__}
        log = tmp_path / "log"
        with log.open("w") as file, script.progress(Console(file=file, width=200)) as bar:
            store = Store(tmp_path, tmp_path, "made up", record, bar.say)

            def bench_of(layer):
                if opened is not None:
                    opened.append(layer.of)
                return fake if isinstance(fake, FakeBench) else fake()

            missing = tune.fill(settings, store, bench_of, bar, deadline)
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
    _, store, said = tune_with(more, opened=opened, tokens=(1, 16))
    assert said.count("in the table already") == 1
    assert {e.T: e.us for e in store.table().fastest} == {1: 10.0, 2: 10.0, 8: 10.0, 16: 5.0}

    _, store, _ = tune_with(more, again=True, tokens=(1,))
    assert {e.T: e.us for e in store.table().fastest} == {1: 5.0, 2: 10.0, 8: 10.0, 16: 5.0}


def test_the_budget_stops_it_between_sweeps_and_what_is_done_is_kept(tune_with, monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    for module in (tune, tuning_sweep):
        monkeypatch.setattr(module, "time", clock)

    def us(candidate, count):
        if count == 5:
            clock.now = 2.0
        return 10.0

    bench = FakeBench(us=us)
    missing, store, _ = tune_with(
        bench, deadline=1.0, most_configs=1, layouts=("expert_major",), rounds=4
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
        (one,) = configs_to_tune(("output_major",), TINY, 1, 1)
        heavy = FakeBench(broken=(one,))  # an exception's traceback holds on to its frames
        alive.add(heavy)
        return heavy

    opened = Opened()
    missing, _, _ = tune_with(
        make, opened=opened, collects=True, expert_shards=(2, 4), tokens=(1, 8)
    )
    assert missing == []
    assert len(opened) == 3


def test_where_nothing_comes_through_it_says_so(tune_with):
    class Broken(FakeBench):
        def build(self, candidate):
            raise ValueError("no such instruction")

    missing, store, said = tune_with(Broken(), tokens=(1,), most_configs=1)
    assert missing == ["tiny, T = 1: no candidate came through"]
    assert said.count("ValueError: no such instruction") == 2
    assert not store.path.exists()


@on_a_cpu
def test_without_a_gpu_it_measures_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"tune: .* 'cpu'; it needs an NVIDIA GPU .*--interpret"):
        tune.run([f"--out={tmp_path}"])


WHOLE = tuning_bench.Layer("tiny", TINY, TINY.E)


@pytest.mark.parametrize(
    "layer",
    [
        WHOLE,
        tune._expert_shard(WHOLE, 4),
        tuning_bench.Layer("tiny", shapes_of("tiny", "fp8"), TINY.E),
    ],
    ids=["whole", "shard", "fp8"],
)
def test_the_real_bench_with_a_layer_that_runs_anywhere(monkeypatch, layer):
    """The GPU's way through it, chain and all; the shard has no expert of most tokens."""
    factor = [1.0]

    def anywhere(what, out_dtype, interpret):
        assert (what.layout, interpret) == ("expert_major", False)
        scale = factor[0]
        return jax.jit(lambda *case: (scale * reference_experts(*case)).astype(out_dtype))

    monkeypatch.setattr(tuning_bench, "configured_layer", anywhere)
    monkeypatch.setattr(tuning_bench.timing, "STEPS", 4)
    said = []
    bench = LayerBench(
        layer, routing="uniform", seed=0, repeats=3, interpret=False, say=said.append
    )
    assert len(bench.weights) == (8 if layer.shapes.weights == "fp8" else 4)  # half the bytes each
    build = bench.at(1)
    (candidate,) = configs_to_tune(("expert_major",), layer.shapes, 1, 1)
    trial = build(candidate)
    assert 0 < trial.check() < 2e-3
    assert trial.sample() > 0
    trial.finish()
    assert "L2 is not cold" in said[0]
    factor[0] = 1.01
    with pytest.raises(AssertionError, match=r"expert_major\(.*relative error .* is above"):
        build(candidate).check()


def test_equal_candidates_are_one_function():
    """So that a chain, its check and its bits are traced once."""
    one, same = (candidates.configured("expert_major", TINY, 4) for _ in range(2))
    assert candidates.configured_layer(one, "bfloat16") is candidates.configured_layer(
        same, "bfloat16"
    )


@on_a_cpu
def test_script_in_interpret_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--made=up"])
    flags = "--interpret --tokens=1 --layouts=output_major --most_configs=1 --rounds=1"
    folders = f"--out={tmp_path}", f"--records={tmp_path}"
    tune.run([*flags.split(), *folders, "--commit=abc"])
    assert "output_major" in capsys.readouterr().out
    table = parse((tmp_path / "cpu.json").read_text(), jax.__version__)
    assert [e.of for e in table.fastest] == ["tiny"]
    (record,) = table.runs
    assert record["interpreted"] is True
    assert record["read_ceiling_tbps"] is None
    assert "--made=up" in record["command"]
    assert all(0 < e.rel_error < 2e-3 and e.us > 0 for e in table.fastest)
