"""Parallelism: a mesh, and where on it parameters, train states, rows and caches lie."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import Qwen3MoeConfig
from moe_jax.quantization import SCALES, VALUES, is_quantised, split_name
from moe_jax.sharding import (
    MESH_AXES,
    Rule,
    auto_axes,
    axes_of,
    refuse_explicit_context,
    scales_sharding,
)

# How tokens get to the experts of other shards in training; moe_jax/experts/exchange.py.
EXCHANGES = ("auto", "ragged", "padded", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """A mesh and how a model uses it. Hashable, so it is static under jit.

    Attributes:
      mesh: of the axes data, expert and tensor; one that it lacks gets size 1. Its axes become
        Auto, whatever they are, because each layer says itself what moves between devices. An
        AbstractMesh is for lowering to devices that are not there.
      fsdp: whether parameters are split over data too. A step that reads them gathers them first,
        which decoding should not do at each step.
      split_heads: whether tensor splits attention's heads too. Where it does not, each device has
        all of attention and its cache, and a layer has one sum over devices less.
      exchange: of EXCHANGES, how tokens get to other shards' experts in training. "ragged" sends
        what is needed (lax.ragged_all_to_all, CUDA), "padded" blocks that are filled up
        (all_to_all), "gather" all tokens to all shards. "auto" is "ragged" on CUDA, else "padded".

    Raises:
      ValueError: the mesh has another axis, or exchange is none of those.
    """

    mesh: Mesh | AbstractMesh
    fsdp: bool = True
    split_heads: bool = True
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
            mesh = AbstractMesh(sizes, MESH_AXES, axis_types=auto_axes(3), abstract_device=device)
        else:
            order = [self.mesh.axis_names.index(name) for name in MESH_AXES if name in shape]
            mesh = Mesh(self.mesh.devices.transpose(order).reshape(sizes), MESH_AXES, auto_axes(3))
        object.__setattr__(self, "mesh", mesh)

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array]) -> "Parallelism | None":
        """That of parameters by name; None if they are on one device, or on another kind of mesh.

        `fsdp` is whether any of them is split over data, and `split_heads` is False where tensor
        leaves q_proj whole.
        """
        shardings = [getattr(array, "sharding", None) for array in arrays.values()]
        named = [s for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1]
        if not named or not set(named[0].mesh.axis_names) <= set(MESH_AXES):
            return None
        mesh = named[0].mesh
        if not isinstance(mesh, Mesh):
            return None

        def splits(axis: str, part: str = "") -> bool:
            """Whether an axis splits any parameter with `part` in its name."""
            return any(
                axis in jax.tree.leaves(tuple(array.sharding.spec))
                for name, array in arrays.items()
                if part in name and isinstance(array.sharding, NamedSharding)
            )

        whole_heads = mesh.shape.get("tensor", 1) > 1 and not splits("tensor", ".self_attn.q_proj.")
        return cls(mesh=mesh, fsdp=splits("data"), split_heads=not whole_heads)

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
            whole |= axis == "tensor" and ".self_attn." in name and not self.split_heads
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

    def rule(self, config: Qwen3MoeConfig | None = None) -> Rule:
        """(parameter name, shape) -> NamedSharding, as the loaders of moe_jax.checkpoints take.

        Args:
          config: to be checked, and whose FP8 weights are whole over data; None leaves the check to
            the first call of the model, and needs `fsdp=False` for FP8 weights.

        Raises:
          ValueError: the mesh does not divide what it has to, or jax.set_mesh holds Explicit axes.
        """
        if config is None:
            refuse_explicit_context()
        else:
            self.check(config)
        quantised = None if config is None else config.quantization_config

        def of(name: str, shape: Sequence[int]) -> NamedSharding:
            fsdp = False if is_quantised(name, quantised) else None
            return NamedSharding(self.mesh, self.spec(name, shape, fsdp=fsdp))

        return of

    def check(self, config: Qwen3MoeConfig) -> None:
        """Raises a ValueError that lists what of the config the mesh does not divide."""
        refuse_explicit_context()
        divided = {}
        if self.split_heads:
            divided["num_attention_heads"] = (config.num_attention_heads, "tensor")
            divided["num_key_value_heads"] = (config.num_key_value_heads, "tensor")
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

    @property
    def splits_parameters(self) -> bool:
        """Whether parameters are split over several devices of data, and gathered by a layer."""
        return self.fsdp and self.size("data") > 1

    def sharding(self, *spec: Any) -> NamedSharding:
        """Of an array that is no parameter; without arguments it is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def cache_sharding(self, B: int) -> NamedSharding:
        """Of a layer's keys or values [B, kv, C, D]: rows over data, kv over tensor."""
        rows = "data" if self.size("data") > 1 and self.rows("decode", B) else None
        split = self.split_heads and self.size("tensor") > 1
        return self.sharding(rows, "tensor" if split else None)

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
        already stay where they are. The scales of an FP8 parameter go where its values go.
        """

        def sharding_of(name: str, shape: tuple[int, ...]) -> NamedSharding:
            parameter, part = split_name(name)
            if not part:
                return NamedSharding(self.mesh, self.spec(name, shape))
            values = params[parameter + VALUES].shape
            sharding = NamedSharding(self.mesh, self.spec(parameter, values, fsdp=False))
            return scales_sharding(sharding, shape) if part == SCALES else sharding

        def put(name: str, array: jax.Array | np.ndarray) -> jax.Array:
            if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
                return array
            sharding = sharding_of(name, array.shape)
            if sharding.is_fully_addressable:
                return jax.device_put(array, sharding)
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return {name: put(name, array) for name, array in params.items()}
