"""How a model's parameters are laid out over a mesh."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def expert_parallel(
    mesh: jax.sharding.Mesh, axis: str = "expert"
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The rule that splits experts over one axis of a mesh and copies everything else.

    layers.N.mlp.experts.gate_up [E, 2, I, H] and layers.N.mlp.experts.down [E, H, I] are split
    along E, so that each device along the axis holds E / size whole experts; the router, attention,
    norms, embedding, head and dense layers are on every device.

    The rule's shardings have Auto axes on the mesh's devices, whatever the mesh's own axis types
    are, because the compiler places what the model computes. jax.make_mesh's axes are Explicit by
    default, and there JAX refuses a product over a sharded axis.

    Args:
      mesh: any mesh that has the axis.
      axis: the axis to split over.

    Returns:
      (parameter name, shape) -> NamedSharding, as the loaders of moe_jax.checkpoints take.

    Raises:
      ValueError: the mesh has no such axis, or jax.set_mesh holds a mesh with Explicit axes; from
        the rule, the axis's size does not divide E.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis is {axis!r}; expected one of the mesh's, {list(mesh.shape)}")
    in_context = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Explicit in in_context:
        raise ValueError(
            f"jax.set_mesh holds a mesh whose axis_types are {in_context}; expected AxisType.Auto "
            "for each axis, because the compiler places what the model computes"
        )
    size = mesh.shape[axis]
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))

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
