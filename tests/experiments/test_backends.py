"""The script that prints the dispatch and tries it."""

import pytest

from experiments import backends
from experiments.bench.backend_trials import Difference
from moe_jax.decode_step import LAYERS_BACKENDS
from moe_jax.experts import EXPERTS_BACKENDS


def rows(printed):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]


def test_it_prints_what_each_backend_declares_and_what_would_run(capsys):
    backends.run(["--platforms=cuda,NPU", "--tokens=1,2049"])
    printed = rows(capsys.readouterr().out)
    declared = {tuple(row[:2]) for row in printed if row}
    assert {(name, "experts") for name in EXPERTS_BACKENDS} | {("xla", "attention")} <= declared
    assert {(name, "layers") for name in LAYERS_BACKENDS} <= declared
    of_layers = {
        (row[0], row[2]): row[3] for row in printed if len(row) == 5 and row[0] != "layers"
    }
    assert of_layers["cuda", "1"] == "pallas"
    assert of_layers["cuda", "2049"] == of_layers["ascend", "1"] == "blocks"
    chosen = {tuple(row[:3]): row[3:5] for row in printed if len(row) == 6}
    assert chosen["cuda", "decode", "1"] == ["pallas", "output_major"]
    assert chosen["cuda", "prefill", "2049"] == ["grouped_pallas", "-"]
    assert chosen["cuda", "training", "1"] == ["grouped_pallas", "-"]
    assert chosen["ascend", "decode", "1"] == ["portable", "gather"]


def test_it_says_what_the_kernels_lack(capsys):
    backends.run(["--platforms=cuda", "--tokens=1", "--latent_size=1000"])
    why = " ".join(row[5] for row in rows(capsys.readouterr().out) if len(row) == 6)
    assert "pallas does not support L, I = (1000, 768) (it takes multiples of 64)" in why


def test_it_says_what_the_kernels_of_all_layers_lack(capsys):
    backends.run(["--platforms=cuda", "--tokens=1", "--dtype=float32"])
    found = [row for row in rows(capsys.readouterr().out) if row[:3] == ["cuda", "decode", "1"]]
    assert found[0][3] == "blocks"
    assert found[0][4].startswith("pallas does not support dtype float32 (it takes bfloat16); the")


def test_it_says_what_a_mesh_s_devices_run(capsys):
    flags = ["--platforms=cuda", "--tokens=32", "--preset=qwen3_30b_a3b"]
    backends.run([*flags, "--mesh=expert=2,tensor=2"])
    out = capsys.readouterr().out
    found = rows(out)
    assert next(row for row in found if row[:3] == ["cuda", "decode", "32"])[3] == "pallas"
    said = " ".join(out.split())
    assert "on a mesh of data 1, expert 2, tensor 2" in said
    assert "E = 64, K = 8, H = 2048, I = 384" in said
    backends.run([*flags, "--mesh=expert=32"])
    found = rows(capsys.readouterr().out)
    row = next(row for row in found if row[:3] == ["cuda", "decode", "32"])
    assert row[3] == "blocks"
    assert row[4].startswith("pallas does not support more experts for a token than a shard has")


def test_run_shows_what_ran_and_that_the_tokens_agree(capsys):
    flags = "--run=auto,reference --preset=tiny --layers=1 --dtype=float32"
    backends.run([*flags.split(), "--rows=2", "--new_tokens=3"])
    out = capsys.readouterr().out
    ran = {(row[0], row[2], row[6]) for row in rows(out) if len(row) == 9 and row[0]}
    chosen = (
        ("layers", "blocks"),
        ("experts", "portable"),
        ("experts", "reference"),
        ("attention", "xla"),
    )
    assert ran - {("op", "phase", "backend")} == {
        (op, phase, backend) for op, backend in chosen for phase in ("prefill", "decode")
    }
    assert "6 of 6 tokens compared, 0 rows differ" in out
    assert "the tokens agree" in out


def test_a_backend_that_is_wrong_is_found(monkeypatch, capsys):
    right = EXPERTS_BACKENDS["portable"]

    def wrong(x, weights, ids, expert_weights, **options):
        return 100 * right.run(x, weights, ids, expert_weights[:, ::-1], **options)

    monkeypatch.setitem(EXPERTS_BACKENDS, "wrong", backends.dataclasses.replace(right, run=wrong))
    with pytest.raises(SystemExit) as stopped:
        backends.run(
            ["--run=portable,wrong", "--preset=tiny", "--layers=1", "--rows=3", "--new_tokens=4"]
        )
    out = capsys.readouterr().out
    # Its logits are far off, and that must not pass for rounding.
    assert "NOT A TIE" in out
    assert stopped.value.code == "backends: the tokens DIFFER"


@pytest.mark.parametrize("gradients", ["--gradients", "--nogradients"])
def test_time_shows_every_backend_or_what_it_lacks(capsys, gradients):
    flags = "--time=portable,grouped,pallas --preset=tiny --tokens=3 --dtype=float32"
    backends.run([*flags.split(), gradients])
    found = {tuple(row[:2]): row[2:] for row in rows(capsys.readouterr().out) if len(row) == 6}
    assert float(found["3", "portable"][0]) > 0
    assert float(found["3", "grouped"][2]) < 1e-5
    assert found["3", "pallas"][0] == "-"


def test_a_tie_is_a_gap_that_rounding_explains():
    at = {"row": 0, "index": 0, "tokens": (1, 2)}
    assert Difference(**at, gap=0.01, error=0.006).is_tie
    assert not Difference(**at, gap=0.02, error=0.006).is_tie


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=llama"], "--preset is 'llama'; expected one of tiny"),
        (["--tokens=0"], "--tokens has 0; expected 1 to"),
        (["--run=portable"], "--run is portable; expected two of reference"),
        (["--time=triton"], "--time has 'triton'; expected one of reference"),
        (["--dtype=int8"], "--dtype is 'int8'"),
        (["--activation=tanh"], "--activation is 'tanh'; expected one of"),
        (["--mesh=tensor=8"], "num_key_value_heads is 4; expected a multiple of 8, the size of"),
        (["--mesh=expert=0"], "--mesh has 'expert=0'; expected each of data, expert, tensor once"),
        (["left over"], "takes flags only; left over: left over"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        backends.run(arguments)
    assert message in str(stopped.value)
