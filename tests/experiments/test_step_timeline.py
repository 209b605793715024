"""The timeline's numbers from stamps; the stamps themselves need a GPU."""

import jax
import numpy as np
import pytest

from experiments import step_timeline
from experiments.bench import script
from experiments.bench.script import make_console
from moe_jax.presets import PRESETS
from pallas_kernels.decode_step import Residual
from pallas_kernels.decode_step.input_checks import check_inputs
from tests.pallas_kernels.machine import ON_GPU

NEVER = -(2**31)


def test_times_are_after_the_first_block():
    kinds = {
        "second": np.array([[2000, 5000, 6000, 7]], np.int32),
        "first": np.array([[1000, NEVER, 3000, 7], [1500, NEVER, 4500, 8]], np.int32),
    }
    first, second = step_timeline.rows(kinds)
    assert first == ["first", "2", "2", "0.0", "", "", "", "2.0", "2.8", "3.5"]
    assert second == ["second", "1", "1", "1.0", "4.0", "4.0", "4.0", "5.0", "5.0", "5.0"]
    console = make_console(width=130)
    with console.capture() as shown:
        step_timeline.show(console, "decode_layer", kinds, {"first": 2_500_000, "second": 0})
    assert "decode_layer: us" in shown.get() and "second" in shown.get() and " 2.5 " in shown.get()


def bytes_read(*flags):
    settings = script.parse_settings(step_timeline.Settings, [*flags, "--context=512"])
    return step_timeline.bytes_read(settings)


def test_bytes_of_each_task():
    read = bytes_read("--batch=1")
    H, I, MB = 2048, 768, 1e6
    assert read["qkv"] == 2 * 5120 * H and read["o"] == 2 * 4096 * H
    # All K experts of the row: the layer's 113.8 MB, and the cache's 576 slots.
    assert read["gate_up"] + read["down"] == 8 * 3 * 2 * I * H
    assert read["attend"] == 4 * 576 * 128 * 2 * 2
    assert round((sum(read.values()) - read["attend"]) / MB, 1) == 113.8
    # FP8's are half of it, and a float32 for each block of 128 x 128.
    scaled = bytes_read("--batch=1", "--weights=fp8")
    for kind in ("qkv", "o", "gate_up", "down"):
        assert scaled[kind] == read[kind] // 2 + 4 * (read[kind] // 2 // 128**2)
    assert scaled["attend"] == read["attend"]


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_draws_what_a_layer_takes(weights):
    config = PRESETS["qwen3_30b_a3b"]
    drawn = jax.eval_shape(lambda: step_timeline.draw_layer(config, weights, 0))
    cache = jax.ShapeDtypeStruct((2, config.num_key_value_heads, 64, config.head_dim), "bfloat16")
    x = jax.ShapeDtypeStruct((8, config.hidden_size), "bfloat16")
    positions = step_timeline.draw_positions(config, 2, 40)
    assert positions.lengths.tolist() == [40, 40]
    shapes = check_inputs(Residual(x), drawn, cache, cache, positions, 8, 1e-6, True)
    assert (shapes.B, shapes.E, shapes.I) == (2, 128, 768)
    assert shapes.fp8 == (("qkv", "o", "experts") if weights == "fp8" else ())


@pytest.mark.skipif(ON_GPU, reason="there it runs")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a GPU"):
        step_timeline.run([])
