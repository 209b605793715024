"""How a model's parameters are laid out over a mesh."""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec


def expert_parallel(
    mesh: jax.sharding.Mesh, axis: str = "expert"
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The rule that splits experts over one axis of a mesh and copies everything else.

    layers.N.mlp.experts.gate_up [E, 2, I, H] and layers.N.mlp.experts.down [E, H, I] are split
    along E, so that each device along the axis holds E / size whole experts; the router, attention,
    norms, embedding, head and dense layers are on every device.

    Args:
      mesh: any mesh that has the axis.
      axis: the axis to split over.

    Returns:
      (parameter name, shape) -> NamedSharding, as the loaders of moe_jax.checkpoints take.

    Raises:
      ValueError: the mesh has no such axis; from the rule, its size does not divide E.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis is {axis!r}; expected one of the mesh's, {list(mesh.shape)}")
    size = mesh.shape[axis]

    def rule(name: str, shape: tuple[int, ...]) -> NamedSharding:
        if ".mlp.experts." not in name:
            return NamedSharding(mesh, PartitionSpec())
        if shape[0] % size:
            raise ValueError(
                f"{name} has {shape[0]} experts; expected a multiple of {size}, the size of the "
                f"mesh's axis {axis!r}"
            )
        return NamedSharding(mesh, PartitionSpec(axis))

    return rule
