"""What must hold of every layout's kernels as they are lowered for CUDA, which needs no GPU."""

import re
from typing import ClassVar

import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import LAYOUTS, decode_experts
from pallas_kernels.decode_experts.shapes import PUBLISHED_LAYERS, SHAPES
from tests.pallas_kernels.decode_experts.cases import Size, struct_case
from tests.pallas_kernels.machine import kernels_of, lower_for_cuda, mosaic_modules

# Of floats: an order that is another one each time.
SUM_IN_MEMORY = re.compile(r"atomicrmw|cp\.reduce|\b(atom|red)\.\S*\.(f|bf)\d\d")

# Other sizes of the same code: -m slow lowers them.
_USUAL = "qwen3_30b_a3b"
_PRESETS = [
    name if name == _USUAL else pytest.param(name, marks=pytest.mark.slow)
    for name in PUBLISHED_LAYERS
]


class LoweringSuite:
    """Set `layout`, and say which kernels it has."""

    layout: ClassVar[str]
    # StableHLO operations that nothing around the kernels may need.
    forbidden_operations: ClassVar[tuple[str, ...]] = ("sort", "scatter")
    # Copies in one kernel that are neither of weights nor of tokens, and get no hint to L2.
    most_copies_of_ids: ClassVar[int] = 0

    def kernels(self, size: Size) -> list[str]:
        """The names of the kernels that a batch of this size takes."""
        raise NotImplementedError

    @pytest.mark.parametrize("preset", _PRESETS)
    def test_lowers_for_cuda(self, preset):
        shapes = SHAPES[preset]

        # The default config does not depend on T, which only sets the grid.
        assert len({LAYOUTS[self.layout].default_config(shapes, T) for T in range(1, 129)}) == 1
        calls = [(128, jnp.float32)]
        if preset == _USUAL:  # the shipped tables' tests have more of the others
            calls.append((8, jnp.bfloat16))
        for T, out_dtype in calls:
            size = Size(T=T, E=shapes.E, K=shapes.K, H=shapes.H, I=shapes.I)

            def function(*case, out_dtype=out_dtype):
                return decode_experts(*case, layout=self.layout, out_dtype=out_dtype)

            text = lower_for_cuda(function, *struct_case(size))
            kernels = self.kernels(size)
            assert kernels_of(text) == kernels and text.count("custom_call") == len(kernels)
            for operation in self.forbidden_operations:
                assert f"stablehlo.{operation}" not in text
            modules = dict(zip(kernels, mosaic_modules(text), strict=True))
            self.check_kernels(modules)

    def check_kernels(self, modules: dict[str, str]) -> None:
        """What else must hold of the lowered kernels' MLIR."""
        for kernel, module in modules.items():
            assert "mbarrier.try_wait" in module
            assert not SUM_IN_MEMORY.search(module)
            if kernel != "gather_rows":  # whose copies are of a few ids
                loads, hints = map(module.count, ("cp.async.bulk.tensor.shared", "L2::evict_first"))
                assert hints > 0 and 0 <= loads - hints <= self.most_copies_of_ids
