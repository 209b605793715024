"""The step's loss and gradients: definition, goldens, accumulation, dtypes, masks; its updates."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import to_arrays
from moe_jax.traces import RoutingTrace, trace_of
from moe_jax.training import (
    Batch,
    OptimizerOptions,
    TrainOptions,
    gradients_of,
    init_state,
    train_step,
)
from moe_jax.training.objective import MicroSums, RouterSums, Totals, losses_of
from tests.moe_jax.parity.golden import assert_close, golden
from tests.moe_jax.parity.golden import model_of as golden_model
from tests.moe_jax.parity.test_gradients import HARDEST, expected_gradients
from tests.moe_jax.tiny import model_of, random_arrays

E, K, V, S = 4, 2, 40, 10
CONFIG = Qwen3MoeConfig(
    vocab_size=V,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=8,
    norm_topk_prob=True,
    router_aux_loss_coef=1.0,
    router_z_loss_coef=0.1,
)
OPTIONS = TrainOptions(config=CONFIG, compute_dtype="float32")
GATE = "layers.0.mlp.gate.weight"

gradients = jax.jit(gradients_of, static_argnames="options")


def with_coefficients(aux, z):
    return dataclasses.replace(CONFIG, router_aux_loss_coef=aux, router_z_loss_coef=z)


def make_batch(A, B=2, masked=()):
    """A * B rows, whatever A is: two sequences each, padding behind; `masked` are padding alone."""
    rng = np.random.default_rng(5)
    ids = rng.integers(V, size=(8, S)).astype(np.int32)[: A * B]
    segments = np.zeros_like(ids)
    segments[:, 4:] = 1
    segments[1::3, 7:] = -1
    segments[list(masked)] = -1
    labels = np.where(segments < 0, -100, ids)
    labels[:, 2] = -100  # as a prompt's, which is not to be learned
    return Batch(**{
        name: jnp.asarray(array).reshape(A, B, S)
        for name, array in (("input_ids", ids), ("labels", labels), ("segment_ids", segments))
    })  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return random_arrays(CONFIG)


@pytest.fixture(scope="module")
def whole(params):
    """One batch of 8 rows, at once; the second pair of them is padding."""
    return gradients(params, make_batch(1, 8, masked=(2, 3)), options=OPTIONS)


@pytest.fixture(scope="module")
def output():
    """What the model itself says of that batch."""
    batch = make_batch(1, 8, masked=(2, 3))
    run = jax.jit(
        lambda ids, segments: model_of(CONFIG)(
            ids, attention_mask=segments >= 0, segment_ids=segments, output_routings=True
        )
    )
    return run(batch.input_ids[0], batch.segment_ids[0])


def assert_same_leaves(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(np.float64(found[name]) - np.float64(value))
        assert error <= rtol * np.linalg.norm(np.float64(value)), name


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_losses_are_the_definition_in_float64(whole, output):
    batch = make_batch(1, 8, masked=(2, 3))
    labels, segments = np.asarray(batch.labels)[0], np.asarray(batch.segment_ids)[0]
    log_p = log_softmax(np.asarray(output.logits, np.float64))
    pairs = [
        (row, column, labels[row, column + 1])
        for row in range(8)
        for column in range(S - 1)
        if segments[row, column] == segments[row, column + 1] >= 0
        and labels[row, column + 1] != -100
    ]
    cross_entropy = -np.mean([log_p[pair] for pair in pairs])

    valid = segments.reshape(-1) >= 0
    logits = [np.asarray(routing.logits, np.float64)[valid] for routing in output.routings]
    rows = np.concatenate(logits)
    p = np.exp(log_softmax(rows))
    loads = [np.bincount(np.argsort(-x, 1)[:, :K].ravel(), minlength=E) for x in logits]
    aux = E * np.sum(sum(loads) / len(rows) * p.mean(0))
    z = np.mean(np.log(np.exp(rows).sum(1)) ** 2)

    _, metrics = whole
    expected = {
        "cross_entropy": cross_entropy,
        "aux_loss": aux,
        "z_loss": z,
        "loss": cross_entropy + aux + 0.1 * z,
        "targets": len(pairs),
        "tokens": valid.sum(),
        "load": np.stack(loads),
        "imbalance": np.max(loads, 1) * E / np.sum(loads, 1),
        "load_entropy": [-np.sum(f * np.log(f)) for f in (n / n.sum() for n in loads)],
        "router_entropy": [-np.mean(np.sum(q * np.log(q), 1)) for q in np.split(p, 2)],
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_gradients_and_loss_are_those_of_transformers():
    """Routers' and experts', with padding on the left."""
    case = golden(HARDEST)
    ids, labels, mask = (
        jnp.asarray(case.inputs[name][None], jnp.int32)
        for name in ("input_ids", "labels", "attention_mask")
    )
    batch = Batch(input_ids=ids, labels=labels, segment_ids=mask - 1)
    options = TrainOptions(config=case.config, compute_dtype="float32")
    found, metrics = gradients(to_arrays(golden_model(HARDEST)), batch, options=options)
    for name in ("loss", "aux_loss"):
        assert_close(metrics[name], case.outputs[name])
    for key, value in expected_gradients(case).items():
        scale = np.abs(value).max()
        assert_close(found[key] / scale, value / scale)


def test_four_micro_batches_are_one_batch(params, whole):
    """One of them is padding alone: its balance loss by itself would be 0 / 0."""
    batch = make_batch(4, masked=(2, 3))
    found, metrics = gradients(params, batch, options=OPTIONS)
    assert_same_leaves(found, whole[0], 1e-5)
    chex.assert_trees_all_close(metrics, whole[1], rtol=1e-5)

    # A mean of the micro-batches' own losses would be another number.
    others = [set(range(8)) - {2 * i, 2 * i + 1} for i in (0, 2, 3)]
    alone = [gradients(params, make_batch(1, 8, masked=rows), options=OPTIONS) for rows in others]
    means = {name: sum(g[name] for g, _ in alone) / 3 for name in found}
    with pytest.raises(AssertionError):
        assert_same_leaves(means, found, 1e-2)


def test_the_balance_loss_reaches_the_routers(params, whole):
    """Reported without a gradient, it would leave these two the same."""
    without, metrics = gradients(
        params,
        make_batch(4, masked=(2, 3)),
        options=dataclasses.replace(OPTIONS, config=with_coefficients(0.0, 0.1)),
    )
    np.testing.assert_allclose(metrics["aux_loss"], whole[1]["aux_loss"], rtol=1e-5)
    for name in (GATE, "layers.1.mlp.gate.weight"):
        difference = np.linalg.norm(without[name] - whole[0][name])
        assert difference > 0.05 * np.linalg.norm(whole[0][name]), name


def test_a_batch_may_bring_the_experts_of_its_tokens(params, whole, output):
    """Those that the routers would choose change nothing; others are used, padding excepted."""
    ids = trace_of(output.routings).expert_ids  # [layers, 8 * S, K]
    halves = jnp.swapaxes(ids.reshape(2, 2, 4 * S, K), 0, 1)

    def run(ids):
        replay = RoutingTrace(expert_ids=ids)
        batch = dataclasses.replace(make_batch(2, 4, masked=(2, 3)), replay=replay)
        return gradients(params, batch, options=OPTIONS)

    found, metrics = run(halves)
    assert_same_leaves(found, whole[0], 1e-5)
    chex.assert_trees_all_close(metrics, whole[1], rtol=1e-5)

    found, metrics = run((halves + 1) % E)
    np.testing.assert_array_equal(metrics["load"], np.roll(whole[1]["load"], 1, axis=1))
    assert metrics["aux_loss"] != whole[1]["aux_loss"]
    difference = np.linalg.norm(found[GATE] - whole[0][GATE])
    assert difference > 0.05 * np.linalg.norm(whole[0][GATE])


def test_a_batch_of_padding_alone_changes_nothing(params):
    found, metrics = gradients(params, make_batch(1, 8, masked=range(8)), options=OPTIONS)
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))
    for name, value in metrics.items():
        assert not np.any(value), name


def test_remat_and_logits_in_parts_change_nothing(params, whole):
    options = dataclasses.replace(OPTIONS, remat=True, logit_columns=4)
    traced = gradients.trace(params, make_batch(1, 8, masked=(2, 3)), options=options)
    # Each layer, and the body of the loop over columns.
    assert str(traced.jaxpr).count("remat2[") == CONFIG.num_hidden_layers + 1
    found, metrics = traced.lower().compile()(params, make_batch(1, 8, masked=(2, 3)))
    assert_same_leaves(found, whole[0], 1e-5)
    chex.assert_trees_all_close(metrics, whole[1], rtol=1e-5)


def test_bfloat16_is_near_float32(params, whole):
    options = dataclasses.replace(OPTIONS, compute_dtype="bfloat16")
    found, metrics = gradients(params, make_batch(1, 8, masked=(2, 3)), options=options)
    assert {array.dtype for array in found.values()} == {jnp.dtype("float32")}
    for name in ("cross_entropy", "aux_loss", "z_loss"):
        np.testing.assert_allclose(metrics[name], whole[1][name], rtol=2e-2)
    every = [np.concatenate([np.ravel(g[n]) for n in found]) for g in (found, whole[0])]
    # Some tokens go to other experts in bfloat16, so gradients of single experts differ by more.
    assert np.linalg.norm(every[0] - every[1]) < 0.2 * np.linalg.norm(every[1])


def test_the_balance_loss_of_each_layer_by_itself():
    """Two layers that each use one half of the experts balance when pooled, and only then."""
    load = jnp.array([[8, 8, 0, 0], [0, 0, 8, 8]])
    router = RouterSums(load, load / 2.0, z=jnp.zeros(2), entropy=jnp.zeros(2))
    sums = MicroSums(jnp.zeros(()), router)
    totals = Totals(jnp.float32(1), jnp.float32(8), load)
    for balance, expected in (("pooled", 2), ("per_layer", 4)):
        _, terms = losses_of(sums, totals, dataclasses.replace(OPTIONS, balance=balance))
        np.testing.assert_allclose(terms["aux_loss"], expected, rtol=1e-6)


def test_steps_lower_the_loss(params):
    optimizer = OptimizerOptions(learning_rate=1e-2, warmup_steps=2, total_steps=6)
    options = dataclasses.replace(OPTIONS, config=with_coefficients(0.01, 0.0), optimizer=optimizer)
    state = init_state(params, optimizer)
    step = jax.jit(train_step, static_argnames="options", donate_argnames="state")
    seen = []
    for _ in range(6):
        state, metrics = step(state, make_batch(1), options=options)
        seen.append(metrics)
    assert int(state.step) == 6
    losses = [float(metrics.loss) for metrics in seen]
    assert losses[-1] < losses[0] - 0.5
    # The rise to the largest, half the cosine between them, near a tenth of it at the end.
    rates = [float(metrics.learning_rate) for metrics in seen]
    np.testing.assert_allclose(rates[:3], [5e-3, 1e-2, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(rates[4], 1e-2 * (0.1 + 0.9 / 2), rtol=1e-5)
    assert not params[GATE].is_deleted()  # the caller's, though the state was donated
    moved = np.abs(np.asarray(state.params["norm.weight"]) - 1)
    assert 0 < moved.max() < 0.1


def test_what_is_refused(params):
    batch = make_batch(1)
    wrong = dataclasses.replace(batch, labels=batch.labels[:, :, 1:])
    with pytest.raises(ValueError, match=r"batch.labels has shape \(1, 2, 9\); expected \(1, "):
        gradients_of(params, wrong, OPTIONS)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 10\); expected \[A, B, S\]"):
        gradients_of(params, jax.tree.map(lambda a: a[0], batch), OPTIONS)
    replay = RoutingTrace(expert_ids=jnp.zeros((1, 2, S, K), jnp.int32))
    with pytest.raises(
        ValueError, match=r"replay.expert_ids has shape \(1, 2, 10, 2\); expected \["
    ):
        gradients_of(params, dataclasses.replace(batch, replay=replay), OPTIONS)
    with pytest.raises(ValueError, match="compute_dtype is 'float16'; expected one of"):
        TrainOptions(config=CONFIG, compute_dtype="float16")
    with pytest.raises(ValueError, match="logit_columns is 0; expected None or at least 1"):
        TrainOptions(config=CONFIG, logit_columns=0)
    with pytest.raises(ValueError, match="warmup_steps is 10; expected 0 to 9"):
        OptimizerOptions(warmup_steps=10, total_steps=10)
    with pytest.raises(ValueError, match="learning_rate is nan; expected at least 0"):
        OptimizerOptions(learning_rate=float("nan"))
    scaled = {"layers.0.mlp.experts.down.values": jnp.zeros(2, jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match="which is FP8; expected plain parameters"):
        init_state(scaled, OptimizerOptions())
