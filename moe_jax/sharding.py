"""How a model lies on a mesh of devices: the axes, and which of them splits what.

    data      rows of the batch; parameters and optimiser state too, where `fsdp` (FSDP)
    expert    whole experts, and in training rows of the batch
    tensor    attention heads, the inner width of experts and MLPs, the vocabulary

PARTITION is the one table. `Parallelism` reads it: for the loaders, for a train state, and for the
function that computes all layers on each device (moe_jax/parallel_layers.py).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from moe_jax.config import Qwen3MoeConfig

MESH_AXES = ("data", "expert", "tensor")

# How tokens get to the experts of other shards in training; moe_jax/experts/exchange.py.
EXCHANGES = ("auto", "ragged", "padded", "gather")

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
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), MESH_AXES, _auto(3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """A mesh and how a model uses it. Hashable, so it is static under jit.

    Attributes:
      mesh: of the axes data, expert and tensor; one that it lacks gets size 1. Its axes become
        Auto, whatever they are, because each layer says itself what moves between devices. An
        AbstractMesh is for lowering to devices that are not there.
      fsdp: whether parameters are split over data too. A step that reads them gathers them first,
        which decoding should not do at each step.
      exchange: of EXCHANGES, how tokens get to other shards' experts in training. "ragged" sends
        what is needed (lax.ragged_all_to_all, CUDA), "padded" blocks that are filled up
        (all_to_all), "gather" all tokens to all shards. "auto" is "ragged" on CUDA, else "padded".

    Raises:
      ValueError: the mesh has another axis, or exchange is none of those.
    """

    mesh: Mesh | AbstractMesh
    fsdp: bool = True
    exchange: str = "auto"

    def __post_init__(self):
        shape = dict(self.mesh.shape)
        if not set(shape) <= set(MESH_AXES):
            raise ValueError(f"mesh has the axes {list(shape)}; expected some of {MESH_AXES}")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange is {self.exchange!r}; expected one of {EXCHANGES}")
        sizes = tuple(shape.get(name, 1) for name in MESH_AXES)
        if isinstance(self.mesh, AbstractMesh):
            device = self.mesh.abstract_device
            mesh = AbstractMesh(sizes, MESH_AXES, axis_types=_auto(3), abstract_device=device)
        else:
            order = [self.mesh.axis_names.index(name) for name in MESH_AXES if name in shape]
            mesh = Mesh(self.mesh.devices.transpose(order).reshape(sizes), MESH_AXES, _auto(3))
        object.__setattr__(self, "mesh", mesh)

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array]) -> "Parallelism | None":
        """That of parameters by name; None if they are on one device, or on another kind of mesh.

        `fsdp` is whether any of them is split over data.
        """
        shardings = [getattr(array, "sharding", None) for array in arrays.values()]
        named = [s for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1]
        if not named or not set(named[0].mesh.axis_names) <= set(MESH_AXES):
            return None
        if not isinstance(named[0].mesh, Mesh):
            return None
        fsdp = any("data" in jax.tree.leaves(tuple(sharding.spec)) for sharding in named)
        return cls(mesh=named[0].mesh, fsdp=fsdp)

    def size(self, axis: str) -> int:
        """Of one of MESH_AXES."""
        return self.mesh.shape[axis]

    def rows(self, phase: str, B: int) -> tuple[str, ...]:
        """The axes that split the rows of a batch of B.

        Training splits them over data and expert, because each of those computes attention for its
        own rows. Elsewhere data splits them if it divides B.

        Raises:
          ValueError: a training batch has another number of rows than a multiple of both.
        """
        if phase == "training":
            both = self.size("data") * self.size("expert")
            if B % both:
                raise ValueError(
                    f"a micro-batch has {B} rows; expected a multiple of {both}, the devices along "
                    "the mesh's axes data and expert"
                )
            return ("data", "expert")
        return () if B % self.size("data") else ("data",)

    def spec(self, name: str, shape: Sequence[int], *, fsdp: bool | None = None) -> PartitionSpec:
        """How a parameter is split, by PARTITION.

        Args:
          name, shape: the parameter's.
          fsdp: None takes the field's.

        Raises:
          ValueError: an axis does not divide its dimension.
        """
        fsdp = self.fsdp if fsdp is None else fsdp
        found: list[str | None] = []
        for dimension, axis in enumerate(axes_of(name)):
            whole = axis is None or (axis == "data" and not fsdp)
            size = 1 if whole else self.size(axis)
            if shape[dimension] % size and name.endswith(("embed_tokens.weight", "lm_head.weight")):
                size = 1  # the vocabulary may be of any size
            if shape[dimension] % size:
                raise ValueError(
                    f"{name} has {shape[dimension]} in dimension {dimension}; expected a multiple "
                    f"of {size}, the size of the mesh's axis {axis!r}"
                )
            found.append(axis if size > 1 else None)
        return PartitionSpec(*found)

    def rule(self, config: Qwen3MoeConfig) -> Rule:
        """(parameter name, shape) -> NamedSharding, as the loaders of moe_jax.checkpoints take.

        Raises:
          ValueError: the mesh does not divide what it has to, or jax.set_mesh holds Explicit axes.
        """
        self.check(config)
        return lambda name, shape: NamedSharding(self.mesh, self.spec(name, shape))

    def check(self, config: Qwen3MoeConfig) -> None:
        """Raises a ValueError that lists what of the config the mesh does not divide."""
        refuse_explicit_context()
        divided = {
            "num_attention_heads": (config.num_attention_heads, "tensor"),
            "num_key_value_heads": (config.num_key_value_heads, "tensor"),
        }
        if config.moe_layers:
            divided["num_experts"] = (config.num_experts, "expert")
            divided["moe_intermediate_size"] = (config.moe_intermediate_size, "tensor")
        if len(config.moe_layers) < config.num_hidden_layers:
            divided["intermediate_size"] = (config.intermediate_size, "tensor")
        if self.fsdp:
            divided["hidden_size"] = (config.hidden_size, "data")
            divided["moe_latent_size"] = (config.moe_latent_size or 0, "data")
        problems = [
            f"{name} is {value}; expected a multiple of {self.size(axis)}, the size of the mesh's "
            f"axis {axis!r}"
            for name, (value, axis) in divided.items()
            if value % self.size(axis)
        ]
        if problems:
            raise ValueError("\n".join(problems))

    def sharding(self, *spec: Any) -> NamedSharding:
        """Of an array that is no parameter; without arguments it is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def cache_sharding(self, B: int) -> NamedSharding:
        """Of a layer's keys or values [B, kv, C, D]: rows over data, kv over tensor."""
        rows = "data" if self.size("data") > 1 and self.rows("decode", B) else None
        return self.sharding(rows, "tensor" if self.size("tensor") > 1 else None)

    def shardings_of(self, state: Any) -> Any:
        """A NamedSharding for each array of a train state, as restoring it onto the mesh needs.

        Args:
          state: a pytree of arrays or shapes. An array in a dict by parameters' names, as the
            optimiser's moments are too, goes where the parameter goes; others are whole.
        """

        def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
            name = getattr(path[-1], "key", None) if path else None
            if not isinstance(name, str) or not leaf.shape:
                return self.sharding()
            return NamedSharding(self.mesh, self.spec(name, leaf.shape))

        return jax.tree.map_with_path(of_leaf, state)

    def place(self, params: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
        """Parameters by name onto the mesh; each device gets its own part alone.

        Every process is to hold all of them, and the same ones. Those that are on several devices
        already stay where they are.
        """

        def put(name: str, array: jax.Array | np.ndarray) -> jax.Array:
            if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
                return array
            sharding = NamedSharding(self.mesh, self.spec(name, array.shape))
            if sharding.is_fully_addressable:
                return jax.device_put(array, sharding)
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return {name: put(name, array) for name, array in params.items()}


def _auto(count: int) -> tuple[AxisType, ...]:
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
    mesh = mesh.update(axis_types=_auto(len(mesh.axis_names)))

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
