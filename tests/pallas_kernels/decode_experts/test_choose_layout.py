import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import (
    LAYOUTS,
    MODES,
    LayoutChoice,
    api,
    choose_layout,
    decode_experts,
    override_layout,
)
from pallas_kernels.decode_experts.shapes import SHAPES
from tests.pallas_kernels.decode_experts.cases import (
    assert_same_bits,
    make_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import USUAL
from tests.pallas_kernels.machine import INTERPRET


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "cpu"])
@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_batch_has_a_layout_and_a_reason(device, preset, mode):
    for T in range(1, 300):
        choice = choose_layout(device, SHAPES[preset], T, mode)
        assert choice.layout in LAYOUTS
        assert f"T = {T} " in choice.why


@pytest.mark.parametrize(
    ("T", "auto", "invariant"),
    [
        (1, "output_major", "expert_major"),
        (2, "output_major", "expert_major"),
        (3, "expert_major", "expert_major"),
        (129, "expert_major", "expert_major"),
    ],
)
def test_without_a_table_few_tokens_are_read_by_output_and_many_by_expert(T, auto, invariant):
    shapes = SHAPES["qwen3_30b_a3b"]
    assert choose_layout("NVIDIA H20", shapes, T).layout == auto
    assert choose_layout("NVIDIA H20", shapes, T, "invariant").layout == invariant


@pytest.mark.parametrize("device", ["NVIDIA H20", "NVIDIA B200", "cpu"])
@pytest.mark.parametrize("preset", SHAPES)
def test_without_a_table_invariant_keeps_to_one_order_of_sums(device, preset):
    shapes = SHAPES[preset]
    orders = set()
    for T in range(1, 300):
        choice = choose_layout(device, shapes, T, "invariant")
        orders.add(LAYOUTS[choice.layout].sum_order)
    assert len(orders) == 1


def test_auto_runs_the_layout_that_is_chosen(monkeypatch):
    case = make_case(USUAL, 0)
    outputs = {
        layout: decode_experts(*case, layout=layout, out_dtype=jnp.float32, interpret=INTERPRET)
        for layout in LAYOUTS
    }
    asked, ran = [], []

    # Bits tell no layouts of one order of sums apart.
    for name, layout in LAYOUTS.items():

        def run(*arguments, name=name, original=layout.run, **keywords):
            ran.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(layout, run=run))

    for layout in LAYOUTS:

        def choose(device, shapes, T, mode, layout=layout):
            asked.append((device, shapes, T, mode))
            return LayoutChoice(layout, "the test says so")

        monkeypatch.setattr(api, "choose_layout", choose)
        out = decode_experts(*case, out_dtype=jnp.float32, interpret=INTERPRET)
        assert_same_bits(out, outputs[layout])
    assert ran == list(LAYOUTS)
    assert asked == [(jax.devices()[0].device_kind, USUAL.shapes, USUAL.T, "auto")] * len(LAYOUTS)
    chex.assert_tree_all_finite(outputs)


def test_an_override_takes_the_place_of_a_mode_while_it_lasts():
    arguments = ("NVIDIA H20", SHAPES["qwen3_30b_a3b"], 64)
    before = choose_layout(*arguments)
    with override_layout("output_major"):
        assert choose_layout(*arguments)[::2] == ("output_major", None)
        with override_layout("invariant"):
            assert choose_layout(*arguments) == LayoutChoice(
                "expert_major", choose_layout(*arguments, "invariant").why
            )
        with override_layout(None):
            assert choose_layout(*arguments) == before
    assert choose_layout(*arguments) == before
