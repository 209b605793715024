"""How a model lies on a mesh of devices: the axes, and which of them splits what.

    data      rows of the batch; parameters and optimiser state too, where `fsdp` (FSDP)
    expert    whole experts, and in training rows of the batch
    tensor    attention heads, the inner width of experts and MLPs, the vocabulary

PARTITION is the one table. `Parallelism` (parallelism.py) reads it: for the loaders, for a train
state, and for the function that computes all layers on each device (parallel_layers.py).
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

MESH_AXES = ("data", "expert", "tensor")

# Ending of a parameter's name -> the axis that splits each of its dimensions. The first ending that
# fits holds.
PARTITION: dict[str, tuple[str | None, ...]] = {
    ".mlp.experts.gate_up": ("expert", None, "tensor", "data"),  # [E, 2, I, H]
    ".mlp.experts.down": ("expert", "data", "tensor"),  # [E, H, I]
    ".mlp.gate.weight": (None, "data"),  # [E, H]
    ".fc1_latent_proj.weight": (None, "data"),  # [L, H]
    ".fc2_latent_proj.weight": ("data",),  # [H, L]
    ".shared_experts.gate_proj.weight": (None, "data"),  # [N, H]
    ".shared_experts.up_proj.weight": (None, "data"),  # [N, H]
    ".shared_experts.down_proj.weight": ("data",),  # [H, N]
    ".q_proj.weight": ("tensor", "data"),  # [heads * D, H]
    ".k_proj.weight": ("tensor", "data"),  # [kv * D, H]
    ".v_proj.weight": ("tensor", "data"),  # [kv * D, H]
    ".o_proj.weight": ("data", "tensor"),  # [H, heads * D]
    ".q_proj.bias": ("tensor",),
    ".k_proj.bias": ("tensor",),
    ".v_proj.bias": ("tensor",),
    ".gate_proj.weight": ("tensor", "data"),  # [N, H], of a dense layer
    ".up_proj.weight": ("tensor", "data"),  # [N, H]
    ".down_proj.weight": ("data", "tensor"),  # [H, N]
    "embed_tokens.weight": ("tensor", "data"),  # [V, H]
    "lm_head.weight": ("tensor", "data"),  # [V, H]
    "": (),  # norms, and o_proj's bias: on every device
}


def axes_of(name: str) -> tuple[str | None, ...]:
    """The line of PARTITION for a parameter."""
    return next(axes for ending, axes in PARTITION.items() if name.endswith(ending))


Rule = Callable[[str, tuple[int, ...]], NamedSharding]


def make_mesh(
    *, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of these sizes, its axes Auto; tensor's neighbours are next to each other.

    Args:
      data, expert, tensor: at least 1 each.
      devices: as many as the product; None takes the first ones of all processes.

    Raises:
      ValueError: a size is below 1, or there are fewer devices.
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    count = math.prod(sizes.values())
    devices = jax.devices()[:count] if devices is None else list(devices)
    if len(devices) != count:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"there are {len(devices)} devices; expected {count} for {shown}")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), MESH_AXES, auto_axes(3))


def auto_axes(count: int) -> tuple[AxisType, ...]:
    """The axis types of that number of axes, all Auto."""
    return (AxisType.Auto,) * count


def refuse_explicit_context() -> None:
    """Raises a ValueError if jax.set_mesh holds a mesh with Explicit axes."""
    in_context = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Explicit in in_context:
        raise ValueError(
            f"jax.set_mesh holds a mesh whose axis_types are {in_context}; expected AxisType.Auto "
            "for each axis, because the compiler places what the model computes"
        )


def expert_parallel(mesh: Mesh, axis: str = "expert") -> Rule:
    """The rule that splits experts over one axis of any mesh and copies everything else.

    layers.N.mlp.experts.gate_up [E, 2, I, H] and layers.N.mlp.experts.down [E, H, I] are split
    along E, so that each device along the axis holds E / size whole experts, as their values and
    scales are in FP8; the router, attention, norms, embedding, head and dense layers are on every
    device. A mesh of MESH_AXES has Parallelism.rule, which splits the rest too.

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
    refuse_explicit_context()
    size = mesh.shape[axis]
    mesh = mesh.update(axis_types=auto_axes(len(mesh.axis_names)))

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
