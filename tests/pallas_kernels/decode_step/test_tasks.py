"""Lists of tasks: the list in Python as the oracle of the grid, orders that are wrong, races."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.decode_experts import ExpertWeights
from pallas_kernels.decode_step import LayerStep, Residual, tasks
from pallas_kernels.decode_step.add_residual import AddResidual
from pallas_kernels.decode_step.layer import (
    LayerConfig,
    LayerShapes,
    attention_tasks,
    experts_tasks,
    router_tasks,
)
from pallas_kernels.decode_step.split_product import SplitProduct
from pallas_kernels.decode_step.tasks import Task, check_order, run_as_grid, run_in_python
from tests.pallas_kernels.decode_step.cases import (
    POISONED,
    Case,
    assert_right,
    layer_shapes,
    make_case,
    run,
)
from tests.pallas_kernels.machine import INTERPRET, ON_GPU, lower_for_cuda, mosaic_modules
from tests.pallas_kernels.races import run_and_assert_no_races

SMALL, LARGER = layer_shapes(1, heads=2, C=64), layer_shapes(3)


def layer_tasks(s: LayerShapes, num_parts: int) -> list[Task]:
    config = LayerConfig()
    attention = attention_tasks(s, config, num_parts)
    return [*attention, *router_tasks(s), *experts_tasks(s, config)]


def arrays_of(case: Case) -> dict[str, jax.Array]:
    """What a layer's tasks read, by name."""
    D = case.keys.shape[-1]
    experts = ExpertWeights(gate_up=case.weights.gate_up, down=case.weights.down)
    rows = experts.as_halves() if experts.quantised else experts.as_rows()
    found = {"x": case.residual.x, "parts": case.residual.parts}
    found |= case.weights._asdict() | case.positions._asdict()
    found |= {"keys": case.keys.reshape(-1, D), "values": case.values.reshape(-1, D)}
    return found | {"gate_up": rows.gate_up, "down": rows.down}


def step_of(known: dict[str, jax.Array], case: Case, s: LayerShapes) -> LayerStep:
    return LayerStep(
        residual=Residual(known["residual"], known["outputs"].reshape(s.K, s.N, s.H)),
        keys=known["keys"].reshape(case.keys.shape),
        values=known["values"].reshape(case.values.shape),
        ids=known["ids"].reshape(s.B, s.K),
        weights=known["weights"].reshape(s.B, s.K),
        logits=known["logits"],
    )


@pytest.fixture(scope="module")
def by_python():
    """A case with rows of all kinds, and what its list comes to in Python."""
    case = make_case(LARGER, (0, 3 * LARGER.C + 70, 5), 0, valid=[1, 1, 0], num_parts=2)
    known = jax.jit(lambda arrays: run_in_python(layer_tasks(LARGER, 2), arrays))(arrays_of(case))
    return case, step_of(known, case, LARGER)


def test_a_layers_list_in_python_matches_the_reference(by_python):
    """Its tasks mean together what the layer means."""
    assert_right(by_python[1], by_python[0], LARGER)


def test_a_grid_agrees_with_its_list_in_python(by_python):
    case, expected = by_python
    found, valid = run(case, LARGER), case.positions.valid > 0
    np.testing.assert_array_equal(found.ids, expected.ids)
    for name in ("keys", "values", "logits", "weights"):
        these, those = (np.asarray(getattr(step, name), np.float32) for step in (found, expected))
        where = np.asarray(valid)
        np.testing.assert_allclose(these[where], those[where], rtol=2**-6, atol=2**-6)
    totals = (np.asarray(step.residual.total(valid), np.float32) for step in (found, expected))
    np.testing.assert_allclose(*(total[where] for total in totals), rtol=2**-6, atol=2**-5)


# --- lists of two tasks


def two_tasks(add: AddResidual | None = None, **changes) -> list[Task]:
    """Scaled = weight * (x + parts), then its product with 64 rows."""
    add = add or AddResidual(T=1, H=128, N=8, num_parts=1)
    product = SplitProduct(T=1, N=8, rows=(64,), columns=128, after="add")
    second = Task(
        kind="product",
        work=product,
        reads={"tokens": "scaled", "weights_0": "weights"},
        writes={"partials": "partials"},
        waits_for={"add": product.num_blocks},
    )
    return [
        Task(
            kind="add",
            work=add,
            reads={"x": "x", "parts": "parts", "norm_weight": "norm_weight"},
            writes={"scaled": "scaled", "squares": "squares", "total": "total"},
        ),
        dataclasses.replace(second, **changes),
    ]


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    shapes = {"x": (8, 128), "norm_weight": (128,), "weights": (64, 128)}
    rng = np.random.default_rng(0)
    found = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for name, shape in shapes.items()
    }
    return found | {"parts": jnp.asarray(rng.standard_normal((1, 8, 128)), jnp.float32)}


run_two = functools.partial(run_as_grid, results=("partials",), name="two", interpret=POISONED)


def test_two_tasks_as_a_grid(arrays):
    found, expected = (
        known["partials"][:, :1]  # of the one token; to the other rows nothing is added
        for known in (run_two(two_tasks(), arrays), run_in_python(two_tasks(), arrays))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_grid_has_stamps_of_each_block(arrays):
    """In interpret mode they are not written; on a GPU each block begins before it ends."""
    grid = two_tasks()
    found = run_as_grid(grid, arrays, ("partials",), name="two", interpret=INTERPRET, stamped=True)
    num_blocks = sum(task.work.num_blocks for task in grid)
    assert found["stamps"].shape == (num_blocks, 4)
    if ON_GPU:
        begin, waited, end, core = np.asarray(found["stamps"]).T
        assert (end - begin >= 0).all() and (core >= 0).all() and (core < 256).all()
        # The product's blocks wait for all of the first task's.
        first = grid[0].work.num_blocks
        assert (waited[first:] - begin[first:] >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": {"tokens": "other"}}, r"task 'product' reads ['other'], which no earlier task"),
        ({"waits_for": {"norm": 1}}, r"task 'product' waits for ['norm'], which are no earlier"),
        ({"updates": {"cache": "keys"}}, r"task 'product' reads ['keys'], which no earlier task"),
        ({"kind": "add", "waits_for": {}}, r"task 'add' stands twice in the list"),
        ({"writes": {"partials": "x"}}, r"task 'product' writes ['x'], which exist already"),
    ],
)
@pytest.mark.parametrize("runner", [run_in_python, run_two])
def test_a_list_out_of_order_is_an_error(runner, change, message, arrays):
    with pytest.raises(ValueError, match=re.escape(message)):
        runner(two_tasks(**change), arrays)


def test_a_list_turned_around_is_an_error():
    with pytest.raises(ValueError, match=r"task 'product' reads \['scaled'\]"):
        check_order(two_tasks()[::-1], ("x", "parts", "norm_weight", "weights"))


# --- faults that no list shows, found as blocks run one after the other


def assert_a_wait_finds(found: int, expected: int, grid: list[Task], arrays) -> None:
    message = f"waits for counter .*, where {found} of {expected} blocks have signalled"
    try:
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(run_two(grid, arrays))
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


class Silent(AddResidual):
    """Its second block does not signal."""

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        def send(*arguments, **keywords):
            jax.lax.cond(block_id == 0, lambda: signal(*arguments, **keywords), lambda: None)

        super().run(block_id, arrays, shared, full, wait, send)


@pytest.mark.skipif(ON_GPU, reason="a GPU would hang")
def test_a_missing_signal_is_found(arrays):
    assert_a_wait_finds(1, 2, two_tasks(Silent(T=1, H=128, N=8, num_parts=1)), arrays)


@pytest.mark.skipif(ON_GPU, reason="a GPU would hang")
def test_a_wait_for_a_later_task_is_found(arrays, monkeypatch):
    monkeypatch.setattr(tasks, "check_order", lambda *_: None)
    assert_a_wait_finds(0, 2, two_tasks()[::-1], arrays)


def test_what_nothing_waits_for_is_not_signalled(arrays):
    """A counter that nothing sets back would not be zero for the next grid."""

    def signals(kinds):
        grid = [task.among(kinds) for task in two_tasks() if task.kind in kinds]
        results = [name for task in grid for name in task.writes.values()]
        text = lower_for_cuda(
            lambda arrays: run_as_grid(grid, arrays, results, name="some", interpret=False), arrays
        )
        [module] = mosaic_modules(text)
        return module.count("red.add.release.gpu")

    assert [signals(kinds) for kinds in (("add", "product"), ("add",))] == [1, 0]


# --- each kind of task by itself


def run_one_by_one(case: Case, *, interpret) -> dict[str, jax.Array]:
    """What a layer's tasks up to the top-k write, each task on its own launch.

    The race detector takes the blocks of a grid for concurrent and does not see counters. It has
    seen the phases of attention in decode_attention's tests, and the experts' in decode_experts'.
    """
    known = arrays_of(case)
    for task in layer_tasks(SMALL, 2)[:-2]:
        if task.kind in ("attend", "merge"):
            found = task.work.reference(
                {r: known[n] for r, n in (task.reads | task.updates).items()}
            )
            known |= {name: found[role] for role, name in task.writes.items()}
            continue
        given = {name: known[name] for name in task.reads.values()}
        results = tuple(task.writes.values())
        known |= run_as_grid([task.among(())], given, results, name=task.kind, interpret=interpret)
    return {name: known[name] for name in ("residual", "moe_input", "logits", "ids", "weights")}


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")
def test_no_task_races(seed):
    case = make_case(SMALL, [40], seed, num_parts=2)
    found = run_and_assert_no_races(run_one_by_one, case)
    grid = layer_tasks(SMALL, 2)[:-2]
    expected = jax.jit(lambda arrays: run_in_python(grid, arrays))(arrays_of(case))
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    for name in found:
        these, those = (np.asarray(some[name], np.float32)[:1] for some in (found, expected))
        np.testing.assert_allclose(these, those, rtol=2**-6, atol=2**-6)
