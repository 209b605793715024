"""The measure of a decode step: its rows, its limit, and what keeps its figures honest."""

import dataclasses
import inspect
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import decode_speed, render_results
from experiments.bench import (
    decode_bytes,
    decode_chain,
    decode_plots,
    decode_records,
    decode_session,
    decode_tables,
    kernel_profile,
    records,
    transformers_child,
)
from experiments.bench.decode_records import DecodeRow
from moe_jax import generation
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import parameter_shapes, to_arrays
from moe_jax.presets import PRESETS
from moe_jax.traces import RoutingTrace
from tests.experiments.test_records import RUN

TINY = PRESETS["tiny"]


class Ran(NamedTuple):
    path: pathlib.Path
    model: Qwen3Moe
    chain: decode_chain.DecodeChain


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of the script on the first layer: its record's path, its model and its chain."""
    out = tmp_path_factory.mktemp("decode_speed")
    flags = ["--preset=tiny", "--layers=1", "--batches=2,600", "--contexts=17", "--steps=2"]
    flags += ["--repeats=1", "--generate_batches=2", "--generate_tokens=5", "--commit=abc"]
    with pytest.raises(SystemExit, match="--batches has 600; expected at most 512"):
        decode_speed.run([*flags, f"--out={out}"])
    flags[2] = "--batches=2"
    asked = []

    def stream(model, prompts, **options):
        """Tokens every 10 ms; to compile the real one takes seconds."""
        inspect.signature(generation.stream).bind(model, prompts, **options)
        asked.append((prompts, options))
        for index in range(options["max_new_tokens"]):
            if index and "on_routing" in options:  # the second row has one expert of the first's
                options["on_routing"](RoutingTrace(expert_ids=jnp.array([[[0, 1], [1, 2]]])))
            for row, _ in enumerate(prompts):
                yield generation.Event(
                    row=row,
                    index=index,
                    token_id=0,
                    text="",
                    finish_reason=None,
                    seconds=1 + index / 100,
                )

    kept = []

    class KeptChain(decode_chain.DecodeChain):
        def __init__(self, model, **options):
            super().__init__(model, **options)
            kept.extend((model, self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_session, "stream", stream)
        patch.setattr(decode_session, "DecodeChain", KeptChain)
        decode_speed.run([*flags, f"--out={out}"])
    assert len(asked) == 3  # the first compiles, the last is not timed
    assert ["on_routing" in options for _, options in asked] == [False, False, True]
    for prompts, options in asked:
        assert [len(prompt) for prompt in prompts] == [17, 17] and prompts[0] != prompts[1]
        assert options["sampling"].temperature == 1.0
    return Ran(out / f"{jax.default_backend()}_tiny_1_layers.jsonl", *kept)


def test_a_run_leaves_a_record_and_a_picture(ran, capsys):
    assert ran.path.with_suffix(".png").exists()
    record = decode_records.read_record(ran.path)
    [row] = record.rows
    assert (record.preset, row.run.commit) == ("tiny_1_layers", "abc")
    assert (row.kind, row.batch, row.context, row.steps, row.feed) == ("decode", 2, 17, 2, "given")
    assert row.error is None and row.ms > 0 and row.first_token_s == 1
    assert row.generate_ms == pytest.approx(10)
    assert row.generate_experts == 3
    # Three experts in place of as many as the chain's, and four steps in place of two: 18.5 keys.
    more = (3 - row.unique_experts) * 3 * 64 * 64 * 2 + 1 * 2 * (2 * 2 * 32 * 2)
    assert row.generate_step_bytes == pytest.approx(row.step_bytes + more)
    assert row.compile_s > 0
    assert row.backends == {"layers": "blocks", "attention": "xla", "experts": "portable"}
    assert 2 <= row.unique_experts <= 4
    # The second token's query sees one key more: 17.5 keys on average, of two rows, in bf16.
    assert row.cache_bytes == 17.5 * 2 * (2 * 2 * 32 * 2)
    assert row.expert_bytes == row.unique_experts * 3 * 64 * 64 * 2
    render_results.run([str(ran.path), "--noplot"])
    assert capsys.readouterr().out.startswith("| batch | context | chain, tok/s |")


def test_bytes_are_those_counted_by_hand():
    """Qwen3-30B-A3B at batch 1: 6.08 GB, as a reader can add up from its config."""
    config = PRESETS["qwen3_30b_a3b"]
    expert_ids = np.tile(np.arange(8), (3, 48, 1, 1))
    read = decode_bytes.step_bytes(
        config, parameter_shapes(config), expert_ids, context=512, cache_itemsize=2
    )
    attention = 2 * (2048 * (4096 + 512 + 512) + 4096 * 2048 + 2 * 128)
    a_layer = attention + 2 * (2 * 2048 + 128 * 2048)
    assert read.weights == 48 * a_layer + 2 * (2048 + 2048)  # the last norm, an embedding
    assert read.experts == 48 * 8 * 3 * 2048 * 768 * 2
    assert read.head == 151936 * 2048 * 2
    assert read.cache == 513 * 48 * 2 * 4 * 128 * 2  # 512, 513 and 514 keys
    row = DecodeRow(run=RUN, kind="decode", batch=1, context=512, steps=3, ms=4.0)
    row.take_bytes(read, 8.0)
    assert row.limit_ms == pytest.approx(read.total / 3.0e12 * 1e3)
    assert row.limit_share == pytest.approx(row.limit_ms / 4.0)
    assert row.limit_tokens_per_s == pytest.approx(480, rel=0.05)


def test_a_tied_head_is_read_and_a_window_bounds_the_cache():
    config = dataclasses.replace(
        TINY, tie_word_embeddings=True, use_sliding_window=True, sliding_window=10
    )
    ids = np.zeros((1, 2, 1, 2), int)
    read = decode_bytes.step_bytes(
        config, parameter_shapes(config), ids, context=40, cache_itemsize=4
    )
    assert read.head == 512 * 64 * 2
    assert read.cache == 9 * 2 * (2 * 2 * 32 * 4)


def test_unique_experts_of_a_step():
    ids = np.array([[[[3, 1], [1, 0]]], [[[2, 5], [-1, -1]]]])  # two steps, one layer
    assert decode_bytes.mean_unique_experts(ids) == [2.5]


def test_given_tokens_differ_over_rows_and_steps():
    tokens = decode_chain.draw_tokens(512, 64, 5, seed=1)
    assert tokens.shape == (5, 64) and tokens.min() >= 0 and tokens.max() < 512
    assert all(len(set(step.tolist())) == 64 for step in tokens)
    assert len({tuple(step.tolist()) for step in tokens}) == 5
    with pytest.raises(ValueError, match="batch is 9; expected at most 8 rows"):
        decode_chain.draw_tokens(8, 9, 1, seed=0)


def test_a_chain_is_the_models_own_steps_on_the_given_tokens(ran):
    """The same cache and tokens through the model itself choose the same tokens and experts."""
    model, chain = ran.model, ran.chain

    @nnx.jit
    def run(model, ids, cache):
        output = model(ids[:, None], cache=cache, output_routings=True)
        return output.cache, output.logits[:, 0].argmax(-1), output.routings[0].ids

    for _ in range(2):  # a run begins where the one before began
        chain.enqueue()
        cache = decode_chain.draw_cache(model, 2, 17, decode_chain.capacity_of(17, 2), 0)
        for step in range(2):
            cache, tokens, expert_ids = run(model, chain.tokens[step], cache)
            np.testing.assert_array_equal(chain.chosen()[step], tokens)
            np.testing.assert_array_equal(chain.expert_ids()[step, 0], expert_ids)
    scopes = kernel_profile.DECODE_STEP.of_instructions(chain.compiled.as_text())
    assert {"experts", "router", "attention", "head", "rest"} <= set(scopes.values())
    parameters, *others = chain._fixed
    broken = parameters | {"norm.weight": jnp.full(64, jnp.nan, jnp.bfloat16)}
    chain._fixed = (broken, *others)
    chain.enqueue()
    with pytest.raises(FloatingPointError, match="step 0, row 0: the logits are NaN"):
        chain.chosen()


def _rows():
    def row(B, context, ms, kind="decode", **fields):
        return DecodeRow(run=RUN, kind=kind, batch=B, context=context, steps=16, ms=ms, **fields)

    return [
        row(
            1,
            512,
            4.0,
            step_bytes=6e9,
            generate_ms=5.0,
            generate_step_bytes=9e9,
            kernels={"experts": [48.0, 1500.0]},
        ),
        row(8, 512, 10.0, step_bytes=2.4e10),
        row(1, 4096, 4.4, step_bytes=6.4e9),
        row(8, 4096, None, notes={"error": "out of memory"}),
        row(1, 512, 8.0, kind="transformers", versions={"torch": "2.11"}),
        row(32, 512, 30.0, kind="transformers"),
    ]


def test_the_table_sets_the_baseline_beside_the_model(tmp_path):
    path = tmp_path / "h100_qwen3_30b_a3b.jsonl"
    record = records.Record(preset="qwen3_30b_a3b", rows=_rows())
    records.write_record(path, record)
    assert decode_records.read_record(path) == record
    page = tmp_path / "page.md"
    marked = (
        f"<!-- results:decode_speed/{path.stem} -->\n{{}}\n<!-- end of results:decode_speed -->"
    )
    page.write_text(marked.format("old"))
    render_results.run([str(path), f"--into={page}"])
    assert page.read_text() == marked.format(decode_tables.to_markdown(record))
    assert path.with_suffix(".png").exists()
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().split("\n")
    ]
    cells = {(line[0], line[1]): dict(zip(lines[1], line, strict=True)) for line in lines[3:8]}
    assert cells["1", "512"]["of the limit"] == "50%"
    assert cells["1", "512"]["of its limit"] == "60%"
    assert cells["1", "512"]["faster"] == "2.00"
    assert cells["8", "4096"]["chain, tok/s"] == "-"
    assert cells["32", "512"]["transformers"] == "1067"
    assert "decode at batch 8, context 4096 failed: out of memory" in page.read_text()
    assert len(decode_plots.figure_of("x", _rows()).axes) == 3
    with pytest.raises(ValueError, match="kind is 'decode'; expected one of run, layout, baseline"):
        records.read_record(path)


def test_the_baselines_process_says_what_it_lacks(monkeypatch):
    """Its lines become dictionaries; a line of what is missing, or its death, becomes an error."""
    script = "import json; print('{}'); print(json.dumps({'fatal': 'no torch'}))"
    arguments, popen = ({"a": 1}, [(1, 2)]), subprocess.Popen
    for text, error in ((script, "no torch"), ("raise SystemExit('dead')", "status 1:\ndead")):

        def start(command, *, text_of_child=text, **options):
            assert json.loads(command[-1])["pairs"] == [[1, 2]]
            return popen([sys.executable, "-c", text_of_child], **options)

        monkeypatch.setattr(transformers_child.subprocess, "Popen", start)
        with pytest.raises(transformers_child.BaselineError, match=error):
            list(transformers_child.measure_in_child(*arguments, steps=1, repeats=1, seed=0))


def test_a_preset_in_fp8_has_half_the_bytes(tmp_path):
    def made(weights):
        sizes = {"preset": "tiny", "layers": 1, "contexts": (64,), "out": tmp_path}
        settings = decode_speed.Settings(weights=weights, **sizes)
        arrays = jax.eval_shape(lambda: to_arrays(decode_speed.make_model(settings)))
        linears = [a for name, a in arrays.items() if "_proj." in name or ".experts." in name]
        return settings.name, sum(array.size * array.dtype.itemsize for array in linears)

    (plain_name, plain), (name, scaled) = made("bf16"), made("fp8")
    assert (plain_name, name) == ("tiny_1_layers", "tiny_fp8_1_layers")
    assert 0.5 < scaled / plain < 0.51


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--feed=none", "expected one of given, sampled"),
        ("--layers=3", "--layers is 3; expected 0 to 2"),
        ("--weights=fp4", "--weights is 'fp4'; expected one of bf16, fp8"),
        ("--dequantize", "--dequantize is given without --checkpoint; expected both"),
        ("--contexts=1020", "--contexts has 1020 and --steps is 16; expected at most 1024"),
        ("--checkpoint=/nowhere", "'/nowhere'; expected a directory"),
        ("--batches=0", "--batches has 0"),
        ("--experts_backend=fast", "'fast'"),
    ],
)
def test_wrong_flags_are_named(flag, message, tmp_path):
    with pytest.raises(SystemExit, match=f"decode_speed: .*{message}"):
        decode_speed.run(["--preset=tiny", "--contexts=64", f"--out={tmp_path}", flag])


@pytest.mark.parametrize("threads", [1, 2])
def test_chains_are_made_in_threads_before_the_first_of_them_is_timed(ran, monkeypatch, threads):
    events = []

    def make(session, model, B, context):
        events.append(f"made {B}")
        if B == 2:
            raise MemoryError("no room")
        return B

    def time_chain(session, model, row, chain):
        events.append(f"timed {chain}")
        return "timed"

    monkeypatch.setattr(decode_session.DecodeSession, "_make_chain", make)
    monkeypatch.setattr(decode_session.DecodeSession, "_time_chain", time_chain)
    [row] = decode_records.read_record(ran.path).rows
    session = decode_session.DecodeSession(
        plan=decode_session.DecodePlan(
            run=row.run,
            pairs=[(1, 8), (2, 8), (4, 8)],
            generate_pairs=[],
            steps=1,
            feed="given",
            experts_backend="auto",
            attention_backend="auto",
            generate_tokens=2,
            repeats=1,
            profile=False,
            compile_threads=threads,
        ),
        say=lambda line: None,
    )
    session.run(ran.model)
    assert [row.batch for row in session.rows] == [1, 2, 4]
    assert ["no room" in (row.error or "") for row in session.rows] == [False, True, False]
    if threads == 1:
        assert events == ["made 1", "timed 1", "made 2", "made 4", "timed 4"]
    else:
        assert sorted(events[:2]) == ["made 1", "made 2"]
        assert events[2:] == ["timed 1", "made 4", "timed 4"]
