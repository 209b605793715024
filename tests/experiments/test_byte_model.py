"""The byte model against counts by hand."""

import numpy as np
import pytest

from experiments.compare import byte_model
from experiments.compare.routings import Routing, make_routings
from pallas_kernels.decode_experts import ExpertShapes
from pallas_kernels.decode_experts.shapes import SHAPES

SMALL = ExpertShapes(E=8, K=2, H=128, I=64)
ONE_EXPERT = 3 * 128 * 64 * 2


def _routing(ids):
    ids = np.array(ids, np.int32)
    return Routing(ids, np.ones(ids.shape, np.float32))


def test_counts_by_hand():
    routings = [_routing([[0, 1], [1, 2]]), _routing([[5, 5], [5, 5]])]
    found = byte_model.traffic(routings, SMALL)
    assert found.unique_experts == (3 + 1) / 2
    assert found.unique_bytes == 2 * ONE_EXPERT
    assert found.requested_bytes == 4 * ONE_EXPERT


def test_padding_reads_nothing():
    found = byte_model.traffic([_routing([[-1, 8], [3, 100]])], SMALL)
    assert (found.unique_experts, found.requested_bytes) == (1, ONE_EXPERT)


def test_presets_have_the_published_sizes():
    assert byte_model.expert_bytes(SHAPES["qwen3_30b_a3b"]) == 9_437_184
    layer = SHAPES["qwen3_coder_480b"]
    assert layer.E * byte_model.expert_bytes(layer) == 15_099_494_400


def test_uniform_routing_meets_its_expectation():
    shapes = SHAPES["qwen3_30b_a3b"]
    assert byte_model.expected_unique_experts(shapes, 2) == pytest.approx(15.5)
    for T in (1, 4, 64):
        found = byte_model.traffic(make_routings("uniform", shapes, T, 40, 0), shapes)
        expected = byte_model.expected_unique_experts(shapes, T)
        assert found.unique_experts == pytest.approx(expected, rel=0.03)


def test_floor():
    assert byte_model.floor_us(3e6, 3.0) == pytest.approx(1.0)


def test_bytes_before_an_expert_is_read_again():
    a, b = _routing([[0, 0]]), _routing([[1, 1]])
    # Layers 0 1 0 1: expert 0 of layer 0 comes back after one other expert.
    assert byte_model.bytes_before_reuse([a, a, a, a], 2, SMALL) == ONE_EXPERT
    # With a new expert in the second round it takes a whole cycle.
    assert byte_model.bytes_before_reuse([a, a, b, b], 2, SMALL) == 3 * ONE_EXPERT
