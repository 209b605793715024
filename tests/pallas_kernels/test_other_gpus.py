"""What runs on GPUs that are no Hoppers, and what says that it does not."""

import re

import jax
import pytest

from pallas_kernels.decode_experts import ExpertShapes, choose_layout, decode_experts
from pallas_kernels.decode_step import decode_layer
from pallas_kernels.mosaic.device import capability_of
from tests.pallas_kernels.decode_experts import cases
from tests.pallas_kernels.decode_step.cases import layer_shapes, struct_case
from tests.pallas_kernels.machine import ON_GPU, lower_for_cuda

B200 = "NVIDIA B200"
LAYER = cases.make_case(cases.Size(T=2, E=4, K=2, H=64, I=64), 0)

# Where there is a GPU, that one is compiled for.
pytestmark = pytest.mark.skipif(ON_GPU, reason="names a GPU that is not there")


def lower(layout: str, kind: str) -> str:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tuple(LAYER))
    return lower_for_cuda(
        lambda *arguments: decode_experts(*arguments, layout=layout), *shapes, kind=kind
    )


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", 9),
        ("NVIDIA H200", 9),
        ("NVIDIA GH200 480GB", 9),
        ("NVIDIA B200", 10),
        ("NVIDIA GB200", 10),
        ("NVIDIA A100-SXM4-80GB", 8),
        ("NVIDIA L40S", 8),
        ("NVIDIA GeForce RTX 5090", None),
        ("cpu", None),
    ],
)
def test_capability_by_name(kind, capability):
    assert capability_of(kind) == capability


@pytest.mark.parametrize("layout", ["output_major", "auto", "invariant"])
def test_what_has_no_hopper_instruction_lowers_for_blackwell(layout):
    text = lower(layout, B200)
    assert text.count("custom_call @mosaic_gpu_v2") == 2
    assert "output_major_down" in text
    assert "wgmma" not in text


def test_what_has_says_what_to_take():
    message = "compute capability 9.x; NVIDIA B200 has 10.x, where output_major runs"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        lower("expert_major", B200)


def test_before_hopper_there_is_no_copy_engine():
    with pytest.raises(
        NotImplementedError,
        match=r"capability 9.x or 10.x; NVIDIA A100.* has 8.x, where nothing else runs",
    ):
        lower("output_major", "NVIDIA A100-SXM4-80GB")


def test_auto_on_blackwell_at_any_T():
    shapes = ExpertShapes(E=128, K=8, H=2048, I=768)
    for T in (1, 64):
        assert choose_layout(B200, shapes, T).layout == "output_major"


def test_a_decode_step_says_what_to_take():
    case = struct_case(layer_shapes(1))
    with pytest.raises(NotImplementedError, match=r"B200 has 10\.x, where reference_decode_lay"):
        lower_for_cuda(lambda *case: decode_layer(*case, K=2, eps=1e-6), *case, kind=B200)
