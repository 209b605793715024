"""How a model's parameters are laid out over a mesh.

| parameter | split along | by |
|---|---|---|
| layers.N.mlp.experts.* | E | expert_parallel |
| all others | nothing | expert_parallel |
| NAME.values | what NAME is split along | the loaders of moe_jax.checkpoints |
| NAME.scales | the same, but for dimensions that the mesh does not divide | scales_sharding |
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def expert_parallel(
    mesh: jax.sharding.Mesh, axis: str = "expert"
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The rule that splits experts over one axis of a mesh and copies everything else.

    layers.N.mlp.experts.gate_up [E, 2, I, H] and layers.N.mlp.experts.down [E, H, I] are split
    along E, so that each device along the axis holds E / size whole experts, as their values and
    scales are in FP8; the router, attention, norms, embedding, head and dense layers are on every
    device.

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


def scales_sharding(values: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Where the scales of a quantised parameter go: each dimension as the values' own.

    A dimension that the mesh's axes do not divide is on every device, as [6, 16] over 4 devices
    along [768, 2048]'s rows is.

    Args:
      values: the values' sharding.
      shape: the scales'.

    Raises:
      TypeError: the values are split by another kind than a NamedSharding.
    """
    if values.is_fully_replicated:
        return values
    if not isinstance(values, NamedSharding):
        raise TypeError(
            f"the values of a quantised parameter are split by {values!r}; expected a NamedSharding"
        )

    def divides(size: int, axes) -> bool:
        names = axes if isinstance(axes, tuple) else (axes,)
        return size % math.prod(values.mesh.shape[name] for name in names if name is not None) == 0

    spec = [
        axes if divides(size, axes) else None
        for size, axes in zip(shape, values.spec, strict=False)
    ]
    return NamedSharding(values.mesh, PartitionSpec(*spec))
