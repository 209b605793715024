"""The script that times and checks decode steps on meshes; meshes themselves: moe_jax/on_meshes."""

import jax
import numpy as np
import pytest

from experiments import decode_on_mesh
from experiments.bench import decode_chain, mesh_flags, mesh_records, timing
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays
from moe_jax.presets import PRESETS
from moe_jax.sharding import make_mesh
from tests.moe_jax.tiny import TINY, random_arrays


class FakeChain:
    """Logits that are 1% off on a mesh, and 3% off where a backend is named."""

    compile_s, program_bytes, backends = 1.5, 10, {"layers": "blocks"}

    def __init__(self, model, *, B, steps, parallelism=None, attention_backend="auto", **_):
        self.steps, self._shape = steps, (steps, B)
        off = 0.03 if attention_backend != "auto" else 0.01 * (parallelism is not None)
        self._logits = np.full((B, 4), 1 + off, np.float32)

    def enqueue(self):
        pass

    def chosen(self):
        return np.zeros(self._shape, np.int32)

    def expert_ids(self):
        return np.zeros((*self._shape, 2), np.int32)

    def logits(self):
        return self._logits


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(decode_on_mesh, "DecodeChain", FakeChain)
    monkeypatch.setattr(timing, "measure_step", lambda *_: timing.StepTime(2000.0, 10.0, False))
    monkeypatch.setattr(decode_on_mesh, "to_arrays", lambda _: random_arrays(TINY, "bfloat16"))
    monkeypatch.setattr(decode_on_mesh, "Qwen3Moe", lambda *_, **__: None)


def run(out, *flags):
    decode_on_mesh.run(["--preset=tiny", "--batches=2,8", "--commit=abc", f"--out={out}", *flags])


def test_it_times_and_checks_every_mesh_and_goes_on_after_a_failure(faked, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--mesh=one", "--mesh=tensor=3", "--mesh=data=1,expert=1")
    assert str(stopped.value.code).splitlines() == [
        f"tensor=3, batch {B}, context 512 failed: ValueError: there are {len(jax.devices())} "
        "devices; expected 3 for data 1, expert 1, tensor 3"
        for B in (2, 8)
    ]
    rows = mesh_records.read_record(tmp_path / "cpu_tiny.jsonl").rows
    assert [row.key for row in rows] == [
        (mesh, B, 512) for mesh in ("one", "tensor=3", "data=1,expert=1") for B in (2, 8)
    ]
    last = rows[-1]
    assert (last.ms, last.tokens_per_s, last.same_experts, last.same_tokens) == (2, 4000, 1, 1)
    np.testing.assert_allclose([last.logits_error, last.blocks_error], [0.01, 0.03], rtol=1e-4)
    assert last.within_rounding and rows[0].within_rounding is None
    last.logits_error = 0.07
    assert mesh_records.problems([last]) == [
        "data=1,expert=1, batch 8, context 512: logits are off by 0.0700, and rounding explains "
        "0.0300"
    ]
    # Chains that are compiled at once have no compile time of their own.
    run(tmp_path / "threads", "--mesh=one", "--compile_threads=2")
    threaded = mesh_records.read_record(tmp_path / "threads" / "cpu_tiny.jsonl").rows
    assert [(row.ms, row.compile_s) for row in threaded] == [(2, None)] * 2
    assert rows[0].compile_s == 1.5
    # Those of another run stay with --add; a budget that is spent is said.
    with pytest.raises(SystemExit, match="not begun within --budget_s=0"):
        run(tmp_path, "--mesh=expert=1", "--add", "--budget_s=0")
    assert len(mesh_records.read_record(tmp_path / "cpu_tiny.jsonl").rows) == 8
    assert "times one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mesh=expert=2,expert=2", "--mesh has 'expert=2'; expected each of data, expert, ten"),
        ("--mesh=two", "--mesh has 'two'; expected each of data, expert, tensor once at most"),
        ("--layers=3", "--layers is 3; expected 0 to 2"),
    ],
)
def test_wrong_flags(flag, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, flag)


def test_sizes_of_a_mesh():
    assert mesh_flags.sizes_of(("expert=2", "data=4")) == {"expert": 2, "data": 4}
    assert mesh_flags.parallelism_of(()) is None
    assert not mesh_flags.parallelism_of(("tensor=1", "whole_heads")).split_heads


@pytest.mark.slow
def test_a_chain_on_a_mesh_keeps_the_logits_that_it_chooses_by():
    config = decode_on_mesh.Settings(preset="tiny", layers=1).config
    parallelism = Parallelism(mesh=make_mesh(devices=jax.devices()[:1]), fsdp=False)
    chain = decode_chain.DecodeChain(
        from_arrays(config, parallelism.place(random_arrays(config, "bfloat16"))),
        B=2,
        context=5,
        steps=2,
        parallelism=parallelism,
        keep_logits=True,
    )
    for _ in range(2):  # the second takes over what the first has left
        chain.enqueue()
        logits = chain.logits()
        assert logits.shape == (2, PRESETS["tiny"].vocab_size)
        np.testing.assert_array_equal(np.argmax(logits, axis=1), chain.chosen()[-1])
