"""Expert parallelism on meshes of every kind of axis; on four devices in checkpoints/."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.sharding import expert_parallel
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
