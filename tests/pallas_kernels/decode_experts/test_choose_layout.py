import chex
import jax
import jax.numpy as jnp
import pytest

from experiments.compare.presets import PRESETS
from pallas_kernels.decode_experts import (
    LAYOUTS,
    MODES,
    LayoutChoice,
    api,
    choose_layout,
    decode_experts,
)
from tests.pallas_kernels.decode_experts.cases import Size, assert_same_bits, make_case
from tests.pallas_kernels.machine import INTERPRET


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "cpu"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", MODES)
def test_every_batch_has_a_layout_and_a_reason(device, preset, mode):
    for T in range(1, 300):
        choice = choose_layout(device, PRESETS[preset], T, mode)
        assert choice.layout in LAYOUTS
        assert f"T = {T} " in choice.why


def test_where_nobody_measured_one_token_is_read_by_output_and_many_by_expert():
    shapes = PRESETS["qwen3_30b_a3b"]
    assert choose_layout("NVIDIA H20", shapes, 1).layout == "output_major"
    assert choose_layout("NVIDIA H20", shapes, 128).layout == "expert_major"


def test_auto_runs_the_layout_that_is_chosen(monkeypatch):
    size = Size(T=3, E=4, K=2, H=64, I=64)
    case = make_case(size, 0)
    outputs = {
        layout: decode_experts(*case, layout=layout, out_dtype=jnp.float32, interpret=INTERPRET)
        for layout in LAYOUTS
    }
    # The layouts add in other orders, so their bits tell them apart.
    assert len({out.tobytes() for out in map(jax.device_get, outputs.values())}) == len(LAYOUTS)
    asked = []

    for layout in LAYOUTS:

        def choose(device, shapes, T, mode, layout=layout):
            asked.append((device, shapes, T, mode))
            return LayoutChoice(layout, "the test says so")

        monkeypatch.setattr(api, "choose_layout", choose)
        out = decode_experts(*case, out_dtype=jnp.float32, interpret=INTERPRET)
        assert_same_bits(out, outputs[layout])
    assert asked == [(jax.devices()[0].device_kind, size.shapes, size.T, "auto")] * len(LAYOUTS)
    chex.assert_tree_all_finite(outputs)
