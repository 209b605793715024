"""Cut into parts, Mosaic's search for layouts finds the same ones."""

import re

import jax
import pytest

from pallas_kernels.mosaic.layout_search import REPLACED
from tests.pallas_kernels.decode_step import cases, test_router_tasks
from tests.pallas_kernels.machine import lower_for_cuda, mosaic_modules


def lower_router():
    size = test_router_tasks.Size(T=1, E=64, K=2, H=128)
    case = jax.eval_shape(lambda: test_router_tasks.make_case(size, 0))
    return lower_for_cuda(lambda case: test_router_tasks._route(case, size, False), case)


def lower_layer():
    s = cases.layer_shapes(1)

    def layer(*arguments):
        return cases.run(cases.Case(*arguments), s, interpret=False)

    return lower_for_cuda(layer, *cases.struct_case(s, num_parts=2))


@pytest.mark.parametrize("lower", [lower_router, pytest.param(lower_layer, marks=pytest.mark.slow)])
def test_layouts_are_those_of_mosaics_own_search(lower, monkeypatch):
    found, called = lower(), set()
    for (module, name), own in REPLACED.items():

        def noted(*arguments, own=own, name=name, **keywords):
            called.add(name)
            return own(*arguments, **keywords)

        monkeypatch.setattr(module, name, noted)
    expected = lower()
    assert called == {name for _, name in REPLACED}
    assert _lines(found) == _lines(expected)


def _lines(text: str) -> list[str]:
    """Of the one kernel in a lowered program; Mosaic numbers what it dumps."""
    [module] = mosaic_modules(text)
    return re.sub(r'dump_basename = "\w+"', "", module).splitlines()
