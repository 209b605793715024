"""The layouts by name.

A layout is a module with

    CAPABILITIES                    the GPUs it compiles for, as mosaic.capability_of says them
    Config                          a frozen dataclass of ints and bools
    SUM_ORDER                       a name for the order of sums: layouts of one name give a token
                                    the same bits on a GPU, with any config and at any T
    default_config(shapes, T)       the heuristic, the same at every T
    candidate_configs(shapes, T)    a few configs worth measuring, the default first
    check_config(config, shapes)    raises a ValueError that names the field
    run(...)                        the kernels

and joins by its line in LAYOUTS.
"""

from types import ModuleType

from pallas_kernels.decode_experts import expert_major, output_major

LAYOUTS: dict[str, ModuleType] = {
    "output_major": output_major,
    "expert_major": expert_major,
}
