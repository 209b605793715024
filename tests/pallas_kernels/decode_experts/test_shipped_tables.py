"""Every committed table is sound, and each (layout, config, shape) in it lowers for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import decode_experts, tuned_tables
from pallas_kernels.decode_experts.tuned_tables import Entry, parse, to_text
from tests.pallas_kernels.decode_experts.cases import Size, struct_case
from tests.pallas_kernels.machine import lower_for_cuda

PATHS = sorted(tuned_tables.FOLDER.glob("*.json"))


def _lowerings():
    """An entry for each (layout, config, shape), that of the largest T.

    The slow ones are those whose layout and config an entry before has, in another shape.
    """
    if not PATHS:
        skip = pytest.mark.skip(reason=f"no table is shipped in {tuned_tables.FOLDER.name}/ yet")
        return [pytest.param(None, marks=skip)]
    entries: list[Entry] = []
    for path in PATHS:
        try:
            table = parse(path.read_text(encoding="utf-8"), jax.__version__)
        except ValueError:
            continue  # test_a_table_is_sound says what is wrong
        entries += sorted([*table.fastest, *table.invariant], key=lambda entry: entry.T)
    kept = {(entry.layout, entry.config, entry.shapes): entry for entry in entries}.values()
    seen, lowerings = set(), []
    for entry in kept:
        again = (entry.layout, entry.config) in seen
        seen.add((entry.layout, entry.config))
        marks = [pytest.mark.slow] if again else []
        name = f"{entry.layout}-{entry.of}-T{entry.T}-{len(lowerings)}"
        lowerings.append(pytest.param(entry, id=name, marks=marks))
    return lowerings


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_table_is_sound(path):
    text = path.read_text(encoding="utf-8")
    table = parse(text, jax.__version__)
    assert to_text(table) == text, "not as experiments.tune writes it"
    assert tuned_tables.device_slug(table.device_kind) == path.stem
    assert table.fastest and table.invariant
    for run in table.runs:
        assert {"commit", "command", "date", "driver", "jaxlib", "read_ceiling_tbps"} <= run.keys()
        assert not run.get("interpreted")


@pytest.mark.parametrize("entry", _lowerings())
def test_lowers_for_cuda(entry):
    shapes = entry.shapes
    case = struct_case(Size(T=entry.T, E=shapes.E, K=shapes.K, H=shapes.H, I=shapes.I))

    def function(*case):
        return decode_experts(
            *case, layout=entry.layout, config=entry.config, out_dtype=jnp.bfloat16
        )

    assert "custom_call @mosaic_gpu_v2" in lower_for_cuda(function, *case)
