"""The measure of prefill and training: its rows, its operations, and the products that it times."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import prefill_speed
from experiments.bench import prefill_records, prefill_trials
from experiments.bench.prefill_records import PrefillRow, expert_flop, forward_flop
from moe_jax import generation
from moe_jax.experts import ExpertWeights
from moe_jax.parameters import parameter_shapes
from moe_jax.presets import PRESETS
from tests.experiments.test_records import RUN

FLAGS = ["--preset=tiny", "--layers=1", "--tokens=16,64", "--batches=1,2", "--chunk=8"]
FLAGS += ["--train_layers=1", "--train_tokens=8", "--most_tokens=64", "--commit=abc"]
FLAGS += ["--baseline=transformers", "--baseline_tokens=64"]


def test_a_run_leaves_a_record(monkeypatch, tmp_path, capsys):
    asked = []

    def stream(model, prompts, **options):
        inspect.signature(generation.stream).bind(model, prompts, **options)
        assert (options["max_new_tokens"], options["prefill_chunk"]) == (1, 8)
        asked.append((len(prompts), len(prompts[0])))
        if asked[-1] == (2, 16):
            raise MemoryError("too much")
        yield None

    def time_calls(call, repeats, ahead=1):
        """Traces what would be timed, because to compile it takes seconds."""
        if isinstance(call, functools.partial):  # the first token's, which needs no tracing
            call()
        else:
            jax.eval_shape(call)
        return prefill_trials.Times(ms=2.0, ms_spread=0.5, compile_s=1.0)

    def baseline(config, pairs, **options):
        assert options["phase"] == "prefill" and config["num_hidden_layers"] == 1
        for batch, context in pairs:
            yield {"batch": batch, "context": context, "versions": {"torch": "2"}, "ms": 8.0}

    monkeypatch.setattr(prefill_trials, "stream", stream)
    monkeypatch.setattr(prefill_trials, "time_calls", time_calls)
    monkeypatch.setattr(prefill_speed, "measure_in_child", baseline)
    with pytest.raises(SystemExit, match="generate, batch 2, 16 tokens failed: MemoryError: too"):
        prefill_speed.run([*FLAGS, f"--out={tmp_path}"])
    # 2 x 64 are more than --most_tokens. Each is compiled, then timed.
    assert sorted(asked[:3]) == [(1, 16), (1, 64), (2, 16)]
    assert asked[3:] == [(1, 16), (2, 16), (1, 64)]
    [path] = tmp_path.iterdir()
    record = prefill_records.read_record(path)
    assert record.preset == "tiny_1_layers"
    found = {row.key: row for row in record.rows}
    assert len(found) == 6
    row, other = (found["prefill", name, 1, 64] for name in ("generate", "transformers"))
    assert (row.ms, row.tokens_per_s, other.ms) == (2.0, 32000, 8.0) and row.flop == other.flop
    assert found["training", "experts of one layer", 1, 8].ms == 2.0
    assert found["training", "model of 1 layers", 1, 8].ms == 2.0
    printed = capsys.readouterr().out
    assert "To the first token" in printed and "need a Hopper" in printed
    assert json.loads(path.read_text().splitlines()[1])["commit"] == "abc"


def test_what_would_begin_too_late_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(prefill_speed.Session, "left_s", lambda session: -1.0)
    monkeypatch.setattr(prefill_trials, "stream", lambda *_, **__: iter(()))
    flags = ["--preset=tiny", "--layers=1", "--tokens=16", "--batches=1", "--train_layers=0"]
    with pytest.raises(SystemExit, match=r"generate, batch 1, 16 tokens failed: .* after 7 s"):
        prefill_speed.run([*flags, "--budget_s=7", f"--out={tmp_path}"])


def test_operations_are_those_of_the_parameters_that_a_token_meets():
    config = PRESETS["qwen3_30b_a3b"]
    met = 0
    for name, shape in parameter_shapes(config).items():
        if len(shape.shape) > 1 and name != "embed_tokens.weight":
            part = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            met += part * np.prod(shape.shape)
    scores = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim
    assert forward_flop(config, 1, 1, predicted=1) == pytest.approx(2 * met + scores)
    # Two tokens see three keys together; one of them meets the head.
    head = 2 * config.hidden_size * config.vocab_size
    expected = 3 * (2 * 2 * met - head + 3 * scores)
    assert forward_flop(config, 3, 2, predicted=1) == pytest.approx(expected)
    assert expert_flop(config, 8192) == 65536 * 6 * 2048 * 768


def test_utilisation_is_of_the_datasheets_peak():
    run = dataclasses.replace(RUN, device="h200")
    row = PrefillRow(run=run, kind="product", name="x", tokens=1, ms=2.0, flop=989e9)
    assert row.tflops == pytest.approx(494.5) and row.utilisation == pytest.approx(0.5)
    assert dataclasses.replace(row, run=dataclasses.replace(run, device="cpu")).utilisation is None


def test_the_products_are_those_of_a_layers_training():
    sizes = {"num_experts": 4, "hidden_size": 128, "moe_intermediate_size": 256}
    config = dataclasses.replace(PRESETS["tiny"], **sizes)
    weights = ExpertWeights(
        gate_up=jnp.ones((4, 2, 256, 128), jnp.bfloat16), down=jnp.ones((4, 128, 256), jnp.bfloat16)
    )
    layer = prefill_trials.make_layer(config, weights, 8, seed=0)
    in_all = expert_flop(config, 8)
    products = list(prefill_trials.products(config, layer))
    for product, out in zip(products, _OUTPUTS.values(), strict=True):
        found = jax.tree.leaves(jax.eval_shape(product.run, *product.operands))
        assert [array.shape[-len(shape) :] for array, shape in zip(found, out, strict=True)] == out
        part = 1 / 3 if "down" in product.name else 2 / 3
        assert product.flop == pytest.approx(part * in_all)
    assert [product.name for product in products] == list(_OUTPUTS)


# The last dimensions of what each gives.
_OUTPUTS = {
    "forward, gate and up": [(256,)],
    "the same, both kept": [(256,), (512,)],
    "forward, down": [(128,)],
    "to rows, gate and up": [(128,)],
    "to rows, down": [(256,)],
    "to weights, gate and up": [(4, 512, 128)],
    "to weights, down": [(4, 128, 256)],
    "one dense product, cuBLAS": [(512,)],
}
