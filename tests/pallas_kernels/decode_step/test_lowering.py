"""A layer as it is compiled for a GPU: which kernels, what is in place, and no float atomics."""

import re

import pytest

from pallas_kernels.decode_step.grids import grids
from pallas_kernels.decode_step.layer import LayerConfig
from pallas_kernels.decode_step.tasks import mailbox_shapes
from tests.pallas_kernels.decode_step.cases import Case, qwen3_shapes, run, struct_case
from tests.pallas_kernels.machine import kernels_of, lower_for_cuda, mosaic_modules

LAYER, BLOCKS = ["fresh_mailboxes", "decode_layer"], ["decode_attention", "decode_moe"]
EXPERTS = ["gather_rows", "expert_major"]


def lower(B: int, launches: str, fp8: tuple[str, ...] = ()) -> str:
    """A layer of Qwen3-30B-A3B for CUDA; fp8 names the products whose weights are FP8."""
    s = qwen3_shapes(B, fp8=fp8)

    def layer(*arguments):
        return run(Case(*arguments), s, launches=launches, interpret=False)

    return lower_for_cuda(layer, *struct_case(s, num_parts=8))


@pytest.mark.parametrize(
    ("B", "launches", "kernels"),
    [
        (1, "layer", LAYER),
        pytest.param(8, "layer", LAYER, marks=pytest.mark.slow),
        pytest.param(1, "blocks", BLOCKS, marks=pytest.mark.slow),
        pytest.param(9, "layer", ["decode_attention", *EXPERTS], marks=pytest.mark.slow),
        pytest.param(64, "blocks", ["decode_attention", *EXPERTS], marks=pytest.mark.slow),
    ],
)
def test_lowers_for_cuda(B, launches, kernels):
    text = lower(B, launches)
    assert kernels_of(text) == kernels
    first = next(line for line in text.splitlines() if "output_tuple_indices = " in line)
    # The caches and the mailboxes, and nothing else, are outputs in the place of inputs.
    operands, results = (types_of(part) for part in first.rsplit(" : ", 1)[1].split(" -> "))
    aliases = re.findall(r"output_tuple_indices = \[(\d+)\], operand_index = (\d+)", first)
    s = qwen3_shapes(B)
    cache = f"{B * s.kv * s.C}x{s.D}xbf16"
    in_place = [(results[int(o)], operands[int(i)]) for o, i in aliases]
    assert in_place[:2] == [(cache, cache)] * 2
    assert all(result == operand for result, operand in in_place)
    tasks = [task for grid in grids(s, LayerConfig(), launches, 8).values() for task in grid]
    assert len(in_place) == 2 + 2 * len(mailbox_shapes(tasks))
    for module in mosaic_modules(text):
        # Signals and waits; no float32 sum is added to memory in whatever order they come.
        added = set(re.findall(r"\b(?:red|atom)\.[\w.:]+", module))
        assert all(instruction.endswith((".u32", ".s32")) for instruction in added), added
        assert "atomicrmw" not in module


def types_of(text: str) -> list[str]:
    """The tensor types in a list of them."""
    return re.findall(r"tensor<([^>]+)>", text)
