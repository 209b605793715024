"""The layouts by name.

A layout is a module with

    CAPABILITIES                    the GPUs it compiles for, as mosaic.capability_of says them
    Config                          a frozen dataclass of ints and bools
    SUM_ORDER                       a name for the order of sums: layouts of one name agree in it
    FREE_FIELDS                     the Config's fields that set no order of sums
    default_config(shapes, T)       the heuristic; its other fields are the same at every T
    candidate_configs(shapes, T)    a few configs worth measuring, the default first
    check_config(config, shapes)    raises a ValueError that names the field
    run(...)                        the kernels

and joins by its line in LAYOUTS.
"""

import dataclasses
from types import ModuleType
from typing import Any

from pallas_kernels.decode_experts import expert_major, output_major, streamed

LAYOUTS: dict[str, ModuleType] = {
    "output_major": output_major,
    "expert_major": expert_major,
    "streamed": streamed,
}


def sum_order(layout: str, config: Any) -> tuple:
    """What sets a token's bits: the layout's order of sums, and the config fields that set one.

    Two choices that agree in this give a token the same bits, whatever T is.
    """
    fixed = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in LAYOUTS[layout].FREE_FIELDS
    }
    return LAYOUTS[layout].SUM_ORDER, tuple(sorted(fixed.items()))
