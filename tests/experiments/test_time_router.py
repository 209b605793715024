"""The script that checks and times the router."""

import jax
import numpy as np
import pytest

from experiments import time_router
from experiments.bench import script, timing

TINY = ("--preset=tiny", "--repeats=3")


def test_one_failure_does_not_stop_the_rest(capsys):
    with pytest.raises(SystemExit, match="time_router: 1 of the above failed"):
        time_router.run([*TINY, "--tokens=129,2"])
    printed = capsys.readouterr().out
    assert "T = 129 check FAILED: NotImplementedError: T is 129" in printed
    assert "T = 2 check: logits within" in printed
    assert f"jax {jax.__version__}" in printed


def test_wrong_flags_are_named():
    for flag, message in (("--preset=huge", "'huge'"), ("--tokens=1,x", "has 'x'")):
        with pytest.raises(SystemExit, match=f"time_router: .*{message}"):
            time_router.run([flag])


@pytest.mark.parametrize("name", ["xla", "empty"])
def test_a_chain_of_the_others_can_be_timed_here(name):
    settings = script.parse_settings(time_router.Settings, [*TINY, "--steps=3", "--norm"])
    chain = time_router.router_chain(settings, time_router.VARIANTS[name], 2)
    assert timing.measure_step(chain, 3).us > 0
    x = time_router._draw(settings, 2, settings.seed).x
    np.testing.assert_array_equal(chain.result(), [x.astype(np.float32)])
