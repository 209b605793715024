"""The script that checks and times the router."""

import functools
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from pallas_kernels.decode_experts.shapes import SHAPES

# A registry of the script's own: the scripts share names of flags, which one registry refuses.
FLAGS = flags.FlagValues()
with pytest.MonkeyPatch.context() as patch:
    for kind in ("string", "list", "integer", "bool"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=FLAGS)
        patch.setattr(flags, f"DEFINE_{kind}", define)
    from experiments import time_router


def run(monkeypatch, *arguments) -> int:
    argv = ["time_router", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    before = flagsaver.save_flag_values(FLAGS)
    try:
        with pytest.raises(SystemExit) as exit:
            time_router.main(FLAGS(argv))
    finally:
        flagsaver.restore_flag_values(before, FLAGS)
    return exit.value.code


def test_one_failure_does_not_stop_the_rest(monkeypatch, capsys):
    assert run(monkeypatch, "--preset=tiny", "--tokens=129,2", "--steps=2", "--repeats=3") == 1
    printed = capsys.readouterr().out
    assert "T = 129 check FAILED: NotImplementedError: T is 129" in printed
    assert "T = 2 check: logits within" in printed
    assert f"jax {jax.__version__}" in printed


def test_wrong_flags_are_named(monkeypatch):
    assert "'huge'" in run(monkeypatch, "--preset=huge")
    assert "'1,x'" in run(monkeypatch, "--tokens=1,x")


@pytest.mark.parametrize("name", ["xla", "empty"])
def test_a_chain_of_the_others_can_be_timed_here(name):
    FLAGS(["time_router", "--steps=3", "--norm"])
    chain = time_router._Chain(time_router.VARIANTS[name], SHAPES["tiny"], 2)
    first = chain.result()
    assert time_router.timing.measure(chain, 3).us > 0
    x, _, _ = chain._inputs
    assert (chain.result() == x.astype(first.dtype)).all()
