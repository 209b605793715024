"""What test_placing.py checks, in a process of its own that has four CPU devices.

    python -m tests.moe_jax.checkpoints.on_four_devices FOLDER

with XLA_FLAGS=--xla_force_host_platform_device_count=4 and JAX_PLATFORMS=cpu.
"""

import dataclasses
import pathlib
import sys
import weakref

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoints import (
    hugging_face_load,
    load_hugging_face,
    load_orbax,
    placing,
    save_hugging_face,
    save_orbax,
)
from moe_jax.checkpoints.readers import host_copy
from moe_jax.parameters import to_arrays
from moe_jax.sharding import expert_parallel
from moe_jax.training import TrainOptions, init_state
from moe_jax.training.states import TrainingStates
from tests.moe_jax.checkpoints import hub, test_fp8

CONFIG = hub.config()
TENSORS = hub.tensors(CONFIG)
GATE_UP = "layers.2.mlp.experts.gate_up"  # [4, 2, 8, 16]


def read_sizes(load) -> tuple[dict, list[int]]:
    """A loaded model's arrays, and how many elements each read of the files took.

    Asserts that no part is on the host any more when the next is read.
    """
    sizes, parts = [], []
    read_slice, put = hugging_face_load.read_slice, placing._put

    def counting(*args, **kwargs):
        assert not any(part() is not None for part in parts)
        part = read_slice(*args, **kwargs)
        sizes.append(part.size)
        parts.append(weakref.ref(part))
        return part

    hugging_face_load.read_slice = counting
    # A CPU device may use the host's memory as it is; a copy makes it a device of its own.
    placing._put = lambda host, device: put(host.copy(), device)
    try:
        return to_arrays(load()), sizes
    finally:
        hugging_face_load.read_slice, placing._put = read_slice, put


def check_expert_parallel(folder, mesh, whole: dict) -> None:
    model_rule = expert_parallel(mesh)
    arrays, sizes = read_sizes(lambda: load_hugging_face(folder / "hub", shardings=model_rule))
    for name, array in arrays.items():
        assert array.sharding == model_rule(name, array.shape), name
        assert hub.same(host_copy(array), whole[name]), name
    shards = sorted(arrays[GATE_UP].addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape for shard in shards] == [(1, 2, 8, 16)] * 4
    for e, shard in enumerate(shards):
        assert hub.same(shard.data, whole[GATE_UP][e : e + 1])
    assert arrays["norm.weight"].is_fully_replicated
    # Each element once: four reads of an expert's share, one read of what is on every device.
    experts = sum(".experts." in name for name in arrays)
    assert len(sizes) == len(arrays) + 3 * experts
    assert sum(sizes) == sum(array.size for array in arrays.values())


def check_any_layout(folder, mesh, whole: dict) -> None:
    """Rows, columns and both, replicated over what is left of the mesh."""
    specs = [("expert",), (None, "expert"), ("expert", "other"), ("other",), (("expert", "other"),)]
    dividing = [PartitionSpec(*spec) for spec in specs]

    def rule(name: str, shape: tuple[int, ...]) -> NamedSharding:
        fits = [spec for spec in dividing if len(spec) <= len(shape)]
        spec = fits[sum(map(ord, name)) % len(fits)]
        try:
            NamedSharding(mesh, spec).shard_shape(shape)
        except ValueError:
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    arrays, sizes = read_sizes(lambda: load_hugging_face(folder / "hub", shardings=rule))
    assert sum(sizes) == sum(array.size for array in arrays.values())
    assert len({str(array.sharding.spec) for array in arrays.values()}) >= 4
    for name, array in arrays.items():
        assert array.sharding == rule(name, array.shape)
        assert hub.same(host_copy(array), whole[name]), name


def check_saves(folder, mesh, whole: dict) -> None:
    model = load_hugging_face(folder / "hub", shardings=expert_parallel(mesh))
    save_hugging_face(folder / "saved", model)
    hub.expect_same(hub.read(folder / "saved"), TENSORS)
    save_orbax(folder / "orbax", model)
    rule = expert_parallel(mesh)
    for shardings in (None, rule):
        arrays = to_arrays(load_orbax(folder / "orbax", shardings=shardings))
        hub.expect_same({name: host_copy(array) for name, array in arrays.items()}, whole)
        devices = arrays[GATE_UP].sharding.device_set
        assert len(devices) == (1 if shardings is None else 4)
    assert arrays[GATE_UP].sharding == rule(GATE_UP, arrays[GATE_UP].shape)


def check_runs(folder, mesh, model) -> None:
    """Experts on four devices compute what one device computes."""
    ids = jax.numpy.arange(6)[None]
    logits = jax.jit(lambda model: model(ids).logits)
    spread = load_hugging_face(folder / "hub", shardings=expert_parallel(mesh))
    np.testing.assert_allclose(logits(spread), logits(model), rtol=1e-4, atol=1e-4)


def check_fp8(folder, mesh) -> None:
    """Values and scales of an expert lie together; columns of scales only where they divide."""
    config = hub.config(quantization_config=test_fp8.QUANTIZATION)
    hub.write(folder / "fp8", config, test_fp8.quantised(config)[0])
    whole = to_arrays(load_hugging_face(folder / "fp8"))
    save_orbax(folder / "fp8_orbax", load_hugging_face(folder / "fp8"))

    def by_columns(name: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = ("expert",) if shape[-1] % 4 == 0 else (None,)
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 1), *axes))

    for rule in (expert_parallel(mesh), by_columns):
        for load, source in ((load_hugging_face, "fp8"), (load_orbax, "fp8_orbax")):
            arrays = to_arrays(load(folder / source, shardings=rule))
            for name, array in arrays.items():
                assert hub.same(host_copy(array), whole[name]), name
        gate_up = [arrays[f"{GATE_UP}.{part}"] for part in ("values", "scales")]
        shards = [array.sharding.shard_shape(array.shape) for array in gate_up]
        split = rule is not by_columns  # 3 columns of scales are not split over 4
        assert shards == ([(1, 2, 8, 16), (1, 2, 1, 3)] if split else [(4, 2, 8, 4), (4, 2, 1, 3)])


def check_training_states(folder, model) -> None:
    """A state saved from one mesh goes onto others, its optimiser's part too, bit for bit."""
    options = TrainOptions(config=model.config)
    layer = {name: a for name, a in to_arrays(model).items() if name.startswith("layers.2.")}
    begun = init_state(layer, options.optimizer)
    rng = np.random.default_rng(0)
    moments = {
        name: jax.numpy.asarray(rng.normal(size=array.shape), array.dtype)
        for name, array in begun.params.items()
    }
    optimizer_state = optax.tree.set(begun.optimizer_state, mu=moments)
    expected = dataclasses.replace(begun, optimizer_state=optimizer_state)
    meshes = (
        (jax.make_mesh((4,), ("expert",)), PartitionSpec("expert")),
        (jax.make_mesh((2, 2), ("data", "expert")), PartitionSpec("expert", None)),
        (jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec()),
    )

    def target_on(mesh, spec):
        """Arrays of experts, moments among them, are split; all others are on every device."""

        def struct(path, leaf):
            is_split = ".experts." in jax.tree_util.keystr(path)
            sharding = NamedSharding(mesh, spec if is_split else PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(struct, expected)

    targets = [target_on(*mesh) for mesh in meshes]
    state = jax.device_put(expected, jax.tree.map(lambda leaf: leaf.sharding, targets[0]))
    for step, target in enumerate((*targets[1:], expected), start=1):
        with TrainingStates(folder / "states", options=options, data={}) as states:
            states.save(dataclasses.replace(state, step=state.step + 1))
            states.wait()
            found = states.restore(target)
        assert found.notes == []
        state = found.state
        assert int(state.step) == step
        sets = ((state.params, expected.params), (optax.tree.get(state, "mu"), moments))
        for arrays, values in sets:
            assert arrays[GATE_UP].sharding == target.params[GATE_UP].sharding
            for name, array in arrays.items():
                assert hub.same(host_copy(array), np.asarray(values[name])), name
    saved = ocp.metadata(folder / "states" / "3", checkpointable_name="training").metadata
    chunk_shape = saved["optimizer"][1][0]["mu"][GATE_UP].storage_metadata.chunk_shape
    assert chunk_shape == (1, 2, 8, 16)


def check_refusals(folder) -> None:
    mesh = jax.make_mesh((3,), ("expert",), devices=jax.devices()[:3])
    try:
        load_hugging_face(folder / "hub", shardings=expert_parallel(mesh))
    except ValueError as error:
        assert "has 4 experts; expected a multiple of 3, the size of the mesh's axis" in str(error)
    else:
        raise AssertionError("4 experts were put on 3 devices")


def main(folder: pathlib.Path) -> None:
    assert len(jax.devices()) == 4
    hub.write(folder / "hub", CONFIG, TENSORS, files=2)
    model = load_hugging_face(folder / "hub")
    whole = {name: np.asarray(array) for name, array in to_arrays(model).items()}
    for kind in (AxisType.Explicit, AxisType.Auto):
        check_expert_parallel(folder, jax.make_mesh((4,), ("expert",), axis_types=(kind,)), whole)
    two_by_two = jax.make_mesh((2, 2), ("other", "expert"))
    check_any_layout(folder, two_by_two, whole)
    check_saves(folder, jax.make_mesh((4,), ("expert",)), whole)
    check_runs(folder, jax.make_mesh((4,), ("expert",)), model)
    check_fp8(folder, jax.make_mesh((4,), ("expert",)))
    check_training_states(folder, model)
    check_refusals(folder)
    print("all good")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
