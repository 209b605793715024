"""The script end to end on a checkpoint, what it says of wrong inputs, and its figures."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments.bench import environment, evaluation_records, script
from experiments.generate import LoadedModel
from moe_jax.checkpoints import save_hugging_face
from moe_jax.parameters import to_arrays
from moe_jax.presets import PRESETS
from moe_jax.scoring import TextScores
from moe_jax.tokenization import load_tokenizer
from tests.moe_jax.tiny import model_of

TOKENIZER = pathlib.Path(__file__).parents[1] / "moe_jax" / "generation" / "checkpoint"
CONFIG = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    save_hugging_face(folder, model_of(CONFIG))
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("A router sends tokens to experts.\r\nß\n".encode())
    return path


def flags(checkpoint, text, tmp_path, *more):
    return [f"--checkpoint={checkpoint}", f"--text={text}", f"--out={tmp_path / 'out'}", *more]


def test_script(checkpoint, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("two")
    options = ["--context=12", "--chunk=6", "--compare=phase=decode", f"--text={other}"]
    evaluate.run(flags(checkpoint, text, tmp_path, *options))
    printed = capsys.readouterr().out
    rows = evaluation_records.read_record(tmp_path / "out" / "cpu_m.jsonl").rows
    assert [(row.kind, row.text) for row in rows] == [
        *[("score", name) for name in (str(text), str(other), evaluation_records.ALL)] * 2,
        *[("difference", name) for name in (str(text), str(other), evaluation_records.ALL)],
    ]
    assert [row.way for row in rows[:6]] == [0, 0, 0, 1, 1, 1]
    assert [row.computed["phase"] for row in rows[:6]] == ["prefill"] * 3 + ["decode"] * 3
    assert (rows[0].context, rows[0].stride) == (12, 6)
    assert rows[0].backends == {"layers": "blocks", "experts": "portable", "attention": "xla"}
    assert rows[8].mean_kl < 1e-9 and rows[8].top_agreement == 1
    tokenizer = load_tokenizer(TOKENIZER)
    ids = [tokenizer.encode(path.read_bytes().decode()) for path in (text, other)]
    assert [row.tokens for row in rows[:3]] == [*map(len, ids), sum(map(len, ids))]
    with np.load(tmp_path / "out" / "cpu_m.npz") as saved:
        found = dict(saved)
    assert found["token_ids"].tolist() == ids[0] + ids[1]
    assert found["ends"].tolist() == [len(ids[0]), len(ids[0]) + len(ids[1])]
    assert found["texts"].tolist() == [str(text), str(other)]
    assert [json.loads(way)["phase"] for way in found["computed"]] == ["prefill", "decode"]
    for row in rows[:6]:
        parts = {str(text): slice(0, len(ids[0])), str(other): slice(len(ids[0]), None)}
        logprobs = found["logprobs"][row.way, parts.get(row.text, slice(None))]
        assert np.isnan(logprobs).sum() == row.tokens - row.scored
        assert row.log_likelihood == pytest.approx(np.nansum(logprobs), rel=1e-5)
        assert row.perplexity == pytest.approx(math.exp(-np.nanmean(logprobs)), rel=1e-4)
    assert "loading m, in its own dtype\n" in printed
    assert "Scores, windows of 12 tokens, 6 apart" in printed
    assert f"{rows[2].perplexity:.5g}" in printed
    assert "100.00%" in printed
    assert f"- second: checkpoint {checkpoint}, phase decode, experts_backend auto, " in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--random"], "--checkpoint and --random: both given; expected one of the two"),
        (["--preset=tiny"], "--preset is 'tiny' with --checkpoint; expected it with --random"),
        (["--text=/nowhere"], "--text has '/nowhere'; expected a file of UTF-8: "),
        (["--stride=13", "--context=12"], "--stride is 13; expected 1 to 12, as --context is"),
        (["--stride=0"], "--stride is 0; expected 1 to"),
        (["--context=0"], "--context is 0; expected 1 to"),
        (["--context=1025"], "--context is 1025; expected at most 1024, the model's max_position"),
        (["--batch=0"], "--batch is 0; expected 1 to"),
        (["--chunk=1"], "--chunk is 1; expected 2 to"),
        (["--phase=both"], "--phase is 'both'; expected one of prefill, decode"),
        (["--layout=output_major"], "--layout is 'output_major' with --experts_backend 'auto'; ex"),
        (["--compare=phase"], "--compare has 'phase'; expected NAME=VALUE with a name of check"),
        (["--compare=batch=2"], "--compare has 'batch=2'; expected NAME=VALUE with a name of"),
        (["--compare=dtype=fp8"], "--compare has dtype=fp8: --dtype is 'fp8'; expected one of bfl"),
        (["--compare=layout=auto"], "--compare has layout=auto: --layout is 'auto' with --expe"),
        (["--compare=checkpoint=/nowhere"], "/nowhere is no directory; expected a checkpoint"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(more, message, checkpoint, text, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        evaluate.run(flags(checkpoint, text, tmp_path, *more))
    assert str(stopped.value).startswith("evaluate: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty; expected some text"),
        (b"\xff\xfe", "expected a file of UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"a", "which is 1 token; expected at least 2, one to predict"),
    ],
)
def test_texts_that_have_nothing_to_score(content, message, checkpoint, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        evaluate.run(flags(checkpoint, path, tmp_path))
    assert f"--text has '{path}'" in str(stopped.value) and message in str(stopped.value)


def test_tokenizers(checkpoint, text, tmp_path):
    bare, other = tmp_path / "bare", tmp_path / "other"
    for folder in (bare, other):
        shutil.copytree(checkpoint, folder)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match=r"bare/tokenizer\.json does not exist; expected a Hugg"):
        evaluate.run(flags(bare, text, tmp_path))
    # A BOS token is put first, so that something predicts the first token of the text.
    config = json.loads((other / "tokenizer_config.json").read_text())
    bos, id_ = next(iter(load_tokenizer(other).special_ids.items()))
    config["bos_token"] = load_tokenizer(other).special_tokens[bos]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    asked = script.parse_settings(evaluate.Settings, flags(other, text, tmp_path))
    plain = load_tokenizer(other).encode(text.read_bytes().decode(), add_special_tokens=False)
    assert evaluate.token_ids(asked, CONFIG) == [[id_, *plain]]
    with pytest.raises(SystemExit, match="whose tokenizer makes other tokens of --text; expected"):
        evaluate.run(flags(checkpoint, text, tmp_path, f"--compare=checkpoint={other}"))
    small = dataclasses.replace(CONFIG, vocab_size=256)
    with pytest.raises(
        ValueError, match=r"gives token \d+; expected 0 to 255, as vocab_size is 25"
    ):
        evaluate.token_ids(asked, small)


def test_a_random_model_is_drawn_once_and_converted(text, tmp_path, monkeypatch):
    def load(settings):
        assert settings.dtype is None  # as the first way says
        return LoadedModel(model=drawn, tokenizer=None, defaults=None)

    drawn = model_of(CONFIG, "bfloat16")
    monkeypatch.setattr(evaluate.generate_script, "load_to_generate", load)
    asked = ["--preset=tiny", "--random", f"--text={text}", f"--out={tmp_path}"]
    settings = script.parse_settings(evaluate.Settings, [*asked, "--compare=dtype=float32"])
    first, second = settings.ways()
    assert evaluate.load_model(first, first.dtype) is drawn
    converted = to_arrays(evaluate.load_model(second, first.dtype))
    for name, array in to_arrays(drawn).items():
        assert converted[name].dtype == jnp.float32
        np.testing.assert_array_equal(array.astype(jnp.float32), converted[name])


def scores(logprobs, tops, kl) -> TextScores:
    """Of a text whose first token nothing predicts."""
    N = len(kl) + 1
    nan = np.full((2, 1), np.nan)
    return TextScores(
        token_ids=np.arange(N, dtype=np.int32),
        contexts=np.arange(N, dtype=np.int32),
        logprobs=np.concatenate([nan, logprobs], axis=1).astype(np.float32),
        top_ids=np.concatenate([np.full((2, 1), -1), tops], axis=1).astype(np.int32),
        kl=np.array([np.nan, *kl], np.float32),
    )


def test_figures_of_several_texts(tmp_path):
    found = [
        scores([[-1, -2, -3], [-1, -2.5, -np.inf]], [[1, 2, 3], [1, 2, 4]], [0, 0.25, 0.5]),
        scores([[-np.inf], [-np.inf]], [[5], [5]], [1.25]),
    ]
    rows = evaluation_records.make_rows(
        environment.describe(seed=0, repeats=1, commit="c", read_ceiling_tbps=None),
        texts=["a", "b"],
        found=found,
        ways=[{"phase": "prefill"}, {"phase": "decode"}],
        backends=[{}, {}],
        context=4,
        stride=2,
    )
    first, _, both, worse, *_, of_a, of_b, of_both = rows
    assert (first.log_likelihood, first.perplexity) == (-6, pytest.approx(math.exp(2)))
    assert (both.tokens, both.scored, both.perplexity) == (6, 4, math.inf)
    assert worse.log_likelihood == -math.inf
    assert (of_a.mean_kl, of_a.max_kl, of_a.top_agreement) == (0.25, 0.5, pytest.approx(2 / 3))
    assert (of_a.largest_difference, of_a.largest_at) == (-math.inf, 3)
    assert (of_b.largest_difference, of_b.largest_at) == (0, 1)  # both rule the token out
    assert (of_both.mean_kl, of_both.top_agreement, of_both.largest_at) == (0.5, 0.75, None)
    evaluation_records.print_rows(script.make_console(), rows)  # inf is printed
