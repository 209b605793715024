"""The table of partitions, and expert parallelism on meshes of every kind of axis.

On four devices they run in checkpoints/, training/ and generation/.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from moe_jax.model import Qwen3Moe
from moe_jax.modules import params_of
from moe_jax.parallel_layers import parameter_specs
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, parameter_shapes, to_arrays
from moe_jax.quantization import fp8_config
from moe_jax.sharding import MESH_AXES, axes_of, expert_parallel, make_mesh
from tests.moe_jax.tiny import TINY, model_of


@pytest.mark.parametrize("kinds", [(None, None), ("Explicit", "Auto"), ("Auto", "Auto")])
def test_a_model_runs_on_a_mesh_of_any_axis_types(kinds):
    """jax.make_mesh's default is Explicit, where JAX refuses products over a sharded axis."""
    types = None if kinds[0] is None else tuple(AxisType[kind] for kind in kinds)
    mesh = jax.make_mesh((1, 1), ("data", "expert"), axis_types=types, devices=jax.devices()[:1])
    rule = expert_parallel(mesh)
    arrays = {
        name: jax.device_put(array, rule(name, array.shape))
        for name, array in to_arrays(model_of(TINY)).items()
    }
    assert arrays["layers.1.mlp.experts.down"].sharding.spec == PartitionSpec("expert")
    ids = jnp.zeros((1, 3), jnp.int32)
    logits = jax.eval_shape(lambda arrays: from_arrays(TINY, arrays)(ids).logits, arrays)
    assert logits.shape == (1, 3, TINY.vocab_size)


def test_a_mesh_in_context_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1])
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"axis_types are .*Explicit.*; expected AxisType.Auto"),
    ):
        expert_parallel(mesh)


def parallelism(data=1, expert=1, tensor=1, **options):
    return Parallelism(mesh=AbstractMesh((data, expert, tensor), MESH_AXES), **options)


def test_every_parameter_has_its_line_of_the_table():
    config = dataclasses.replace(
        TINY,
        mlp_only_layers=(0,),
        attention_bias=True,
        moe_latent_size=16,
        moe_shared_expert_intermediate_size=16,
    )
    rule = parallelism(data=2, expert=2, tensor=2).rule(config)
    specs = {
        name.removeprefix("layers.0.").removeprefix("layers.1."): tuple(rule(name, s.shape).spec)
        for name, s in parameter_shapes(config).items()
        if not name.startswith("layers.2")
    }
    columns, rows, whole = ("tensor", "data"), ("data", "tensor"), ()
    attention = {f"self_attn.{n}_proj.weight": columns for n in "qkv"}
    attention |= {f"self_attn.{n}_proj.bias": ("tensor",) for n in "qkv"}
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    assert specs == attention | dict.fromkeys([f"{n}.weight" for n in (*norms, "norm")], whole) | {
        "self_attn.o_proj.weight": rows,
        "self_attn.o_proj.bias": whole,
        "mlp.gate_proj.weight": columns,
        "mlp.up_proj.weight": columns,
        "mlp.down_proj.weight": rows,
        "mlp.gate.weight": (None, "data"),
        "mlp.experts.gate_up": ("expert", None, "tensor", "data"),
        "mlp.experts.down": ("expert", "data", "tensor"),
        "mlp.fc1_latent_proj.weight": (None, "data"),
        "mlp.fc2_latent_proj.weight": ("data",),
        "mlp.shared_experts.gate_proj.weight": (None, "data"),
        "mlp.shared_experts.up_proj.weight": (None, "data"),
        "mlp.shared_experts.down_proj.weight": ("data",),
        "embed_tokens.weight": columns,
        "lm_head.weight": columns,
    }
    assert parallelism(data=2, fsdp=False).spec("norm.weight", (4,)) == PartitionSpec()
    assert parallelism(data=2, fsdp=False).spec("lm_head.weight", (4, 4)) == PartitionSpec(
        None, None
    )
    # A vocabulary that an axis does not divide is whole.
    assert parallelism(tensor=2).spec("lm_head.weight", (5, 4)) == PartitionSpec(None, None)


def test_a_mesh_of_some_axes_in_any_order_is_completed():
    mesh = jax.make_mesh((1, 1), ("tensor", "data"), devices=jax.devices()[:1])
    found = Parallelism(mesh=mesh).mesh
    assert found.axis_names == MESH_AXES and found.devices.shape == (1, 1, 1)
    assert set(found.axis_types) == {AxisType.Auto}
    assert Parallelism(mesh=AbstractMesh((2,), ("expert",))).size("expert") == 2


def test_what_a_mesh_cannot_be():
    with pytest.raises(ValueError, match=r"mesh has the axes \['pipeline'\]; expected some of"):
        Parallelism(mesh=AbstractMesh((2,), ("pipeline",)))
    with pytest.raises(ValueError, match="exchange is 'dense'; expected one of"):
        parallelism(exchange="dense")
    with pytest.raises(ValueError, match="tensor is 0; expected at least 1"):
        make_mesh(tensor=0)
    with pytest.raises(ValueError, match="there are 1 devices; expected 6 for data 3, expert 1, t"):
        make_mesh(data=3, tensor=2, devices=jax.devices()[:1])


def test_sizes_that_a_mesh_does_not_divide_are_listed():
    config = dataclasses.replace(
        TINY, num_attention_heads=4, num_key_value_heads=2, num_experts=9, mlp_only_layers=(0,)
    )
    with pytest.raises(ValueError) as refused:
        parallelism(data=7, expert=2, tensor=4).rule(config)
    lines = str(refused.value).splitlines()
    assert lines[0] == (
        "num_key_value_heads is 2; expected a multiple of 4, the size of the mesh's axis 'tensor'"
    )
    assert [line.split()[0] for line in lines[1:]] == ["num_experts", "hidden_size"]
    with pytest.raises(ValueError, match="down has 6 in dimension 2; expected a multiple of 4"):
        parallelism(tensor=4).spec("layers.0.mlp.experts.down", (2, 4, 6))
    mesh = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"Explicit.*; expected AxisType.Auto"):
        Parallelism(mesh=mesh).rule(TINY)


def test_fp8_weights_are_split_in_whole_blocks():
    config = dataclasses.replace(TINY, quantization_config=fp8_config((0,)), num_hidden_layers=1)
    layers = jax.eval_shape(lambda: params_of(Qwen3Moe(config, rngs=nnx.Rngs(0)))).layers
    specs = parameter_specs(layers, parallelism(expert=2))
    gate_up = specs[0].mlp.experts.gate_up
    assert gate_up.values == gate_up.scales == PartitionSpec("expert", None, None, None)
    name, shape = "layers.0.mlp.experts.down", (8, 128, 128)
    assert "data" in axes_of(name)  # over which a plain weight would be split
    assert parallelism(data=2).rule(config)(name, shape).spec == PartitionSpec(None, None, None)
    message = r"layers.0.self_attn.q_proj.weight has 128 in dimension 0, in FP8 blocks of \(128, 1"
    with pytest.raises(ValueError, match=message):
        parameter_specs(layers, parallelism(tensor=2))


def test_a_model_is_drawn_where_its_parameters_lie():
    """A layer at a time, and with the same numbers; FP8 scales beside their values."""
    config = dataclasses.replace(TINY, quantization_config=fp8_config((0,)), num_hidden_layers=1)
    placing = Parallelism(mesh=make_mesh(devices=jax.devices()[:1]))
    groups = []

    def place(arrays):
        groups.append({name.split(".")[1] for name in arrays if name.startswith("layers.")})
        return placing.place(arrays)

    found = to_arrays(Qwen3Moe(config, rngs=nnx.Rngs(0), place=place))
    assert groups == [{"0"}, {"0"}]  # by itself, then what is left
    expected = to_arrays(Qwen3Moe(config, rngs=nnx.Rngs(0)))
    for name, array in expected.items():
        assert found[name].sharding.mesh == placing.mesh, name
        assert (found[name] == array).all(), name


def test_heads_may_stay_whole():
    split = parallelism(tensor=8, split_heads=False)
    rule = split.rule(TINY)  # which has 2 kv heads
    assert rule("layers.0.self_attn.q_proj.weight", (8, 4)).spec == PartitionSpec(None, None)
    assert rule("layers.0.mlp.up_proj.weight", (8, 4)).spec == PartitionSpec("tensor", None)
    assert split.cache_sharding(2).spec == PartitionSpec(None, None)
