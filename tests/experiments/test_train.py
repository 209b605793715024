"""The script end to end: its files, what generate and evaluate make of them, and going on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, generate, train
from experiments.bench import corpus, evaluation_records, script, train_records, training_run
from moe_jax.checkpoints import load_hugging_face, save_hugging_face, save_orbax
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.tokenization import load_tokenizer
from moe_jax.training import TrainOptions
from tests.experiments.killed_training import BATCH, SIZES, write_text
from tests.moe_jax.tiny import TINY, model_of

RUN = (*BATCH, "--steps=3", "--log_every=2", "--prompt=def ", "--sample_tokens=4")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def made(text):
    """A run's folder."""
    out = text.parent / "made"
    train.run([f"--text={text}", *SIZES, *RUN, f"--out={out}"])
    return out


def test_metrics(made):
    record = train_records.read_record(made / "metrics.jsonl")
    rows = train_records.steps_of(record)
    assert [row.step for row in rows] == [1, 2, 3]  # the first, the second one, and the last
    for row in rows:
        assert row.tokens <= 4 * 16
        assert sum(row.load[0]) == 2 * row.tokens
        expected = row.cross_entropy + 0.01 * row.aux_loss
        np.testing.assert_allclose(row.loss, expected, rtol=1e-5)
    assert rows[0].tokens_per_second is None  # it was compiled
    assert rows[1].tokens_per_second > 0
    assert (made / "train.png").read_bytes().startswith(b"\x89PNG")
    assert (made / "sample.txt").read_text().startswith("--- 'def '\ndef ")


def test_its_checkpoint_generates(made, capsys):
    options = ("--prompt=def ", "--max_new_tokens=4", "--warm_up=false", "--ignore_eos")
    generate.run([f"--checkpoint={made / 'checkpoint'}", *options])
    printed = capsys.readouterr().out
    assert "new tokens: 4" in printed
    tokenizer = load_tokenizer(made / "checkpoint")
    assert tokenizer.eos_id == 0
    assert tokenizer.decode(tokenizer.encode("ünï\tx = 1\n")) == "ünï\tx = 1\n"


def test_evaluate_finds_the_perplexity_that_training_reports(made, tmp_path):
    options = ("--context=16", "--chunk=16", f"--out={tmp_path}")
    held_out = made / "held_out.txt"
    evaluate.run([f"--checkpoint={made / 'checkpoint'}", f"--text={held_out}", *options])
    [row] = evaluation_records.read_record(tmp_path / "cpu_checkpoint.jsonl").rows
    reported = train_records.read_record(made / "metrics.jsonl").rows[-1]
    assert (reported.kind, reported.tokens) == ("held_out", row.tokens)
    np.testing.assert_allclose(row.perplexity, reported.perplexity, rtol=1e-5)


def test_a_run_from_a_checkpoint_beside_another(made, text, tmp_path, capsys):
    train.run([
        f"--from={made / 'checkpoint'}", f"--text={text}", *RUN, f"--out={tmp_path}",
        f"--beside={made}",
    ])  # fmt: skip
    begins, began = (
        train_records.steps_of(train_records.read_record(folder / "metrics.jsonl"))[0]
        for folder in (tmp_path, made)
    )
    assert begins.loss < began.loss - 0.1
    assert not (tmp_path / "tokenizer").exists()
    tokenizers = [
        (folder / "checkpoint/tokenizer.json").read_bytes() for folder in (tmp_path, made)
    ]
    assert tokenizers[0] == tokenizers[1]
    assert "perplexity" in capsys.readouterr().out
    # An Orbax checkpoint is another place for the same numbers.
    model = load_hugging_face(made / "checkpoint")
    save_orbax(tmp_path / "orbax", model, copy_from=made / "checkpoint")
    flags = [f"--from={tmp_path / 'orbax'}", f"--text={text}", *RUN, "--sample_tokens=0"]
    train.run([*flags, f"--out={tmp_path / 'second'}"])
    again = train_records.read_record(tmp_path / "second" / "metrics.jsonl")
    assert train_records.steps_of(again)[0].loss == begins.loss

    changed = to_arrays(load_hugging_face(tmp_path / "checkpoint"))
    before = to_arrays(model)
    assert all(np.any(changed[name] != before[name]) for name in before)


def test_the_picture_has_a_panel_for_each_run(made):
    record = train_records.read_record(made / "metrics.jsonl")
    titles = [
        ax.get_title()
        for ax in train_records.figure_of({"one": record, "two": record}).axes
        if ax.get_title()
    ]
    assert titles[2:] == [f"load of the experts of MoE layer 0: {name}" for name in ("one", "two")]
    dense = dataclasses.replace(record, rows=[dataclasses.replace(record.rows[0], load=[])])
    assert len(train_records.figure_of({"dense": dense}).axes) == 1


def test_a_tokenizer_is_made_once(tmp_path):
    first = corpus.trained_tokenizer(tmp_path, ["a text"], 260)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + " ")  # a trace that a second training would remove
    assert corpus.trained_tokenizer(tmp_path, ["a text"], 260).encode("ä") == first.encode("ä")
    assert path.read_text().endswith(" ")
    corpus.trained_tokenizer(tmp_path, ["another text"], 260)
    assert not path.read_text().endswith(" ")


def test_the_corpus_is_a_sample_with_a_part_held_out(text, tmp_path):
    every = corpus.read_corpus([text], max_bytes=10**6, seed=0)
    again = corpus.read_corpus([text], max_bytes=10**6, seed=0)
    assert every == again != corpus.read_corpus([text], max_bytes=10**6, seed=1)
    assert (len(every.train), len(every.held_out)) == (5, 1)
    assert not set(every.train) & set(every.held_out)
    size = len(every.train[0].encode())
    assert len(corpus.read_corpus([text], max_bytes=3 * size, seed=0).train) == 2
    lone = tmp_path / "lone.txt"
    lone.write_text("0123456789" * 10)
    cut = corpus.read_corpus([lone], max_bytes=1000, seed=0)
    assert "".join((*cut.train, *cut.held_out)) == "0123456789" * 10
    assert len(cut.held_out[0]) == 2
    files = corpus.standard_library()
    assert len(files) > 100
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)


def test_unigram_perplexity():
    # Frequencies 3, 1, 0 and 1 for each: p = 4/7, 2/7, 1/7; the first token is not scored.
    found = corpus.unigram_perplexity([0, 0, 1, 0], [2, 0, 2], 3)
    assert math.isclose(found, math.sqrt(7 / 4 * 7))


def test_the_held_out_loss_is_the_mean_over_whole_batches_of_rows():
    """Of 5 rows, the last of them padded, the first 4 make batches of 2."""
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    ids = np.random.default_rng(1).integers(config.vocab_size, size=27)
    packed = training_run.pack_held_out(ids.tolist(), 6)
    rows = packed.batch(0, A=1, B=5)
    used, labels = (np.asarray(a)[0, :4] for a in (rows.input_ids, rows.labels))
    assert (labels < 0).any()  # the padded row is among them
    model = model_of(config)
    options = TrainOptions(config=config, compute_dtype="float32")
    found = training_run.held_out_loss(to_arrays(model), packed, options=options, B=2)
    log_p = jax.nn.log_softmax(jax.jit(lambda: model(jnp.asarray(used)).logits)())
    nll = -np.take_along_axis(np.asarray(log_p)[:, :-1], np.maximum(labels, 0)[:, 1:, None], -1)
    np.testing.assert_allclose(found, nll[labels[:, 1:] >= 0].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="the held-out text has 1 tokens; expected at least 2"):
        training_run.pack_held_out([3], 6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--from=x", "--hidden=64"], "--hidden is 64 with --from; expected it without"),
        (["--hidden=40"], "--hidden is 40; expected a multiple of 32"),
        (["--experts=2", "--experts_per_token=3"], "--experts_per_token is 3; expected 1 to 2"),
        (["--learning_rate=-1"], r"--learning_rate is -1.0; expected 0 to"),
        (["--beside=nowhere"], "--beside is 'nowhere'; expected a folder with metrics.jsonl"),
        (["--text=nowhere"], "--text has 'nowhere'; expected a file, or a folder with"),
        (["--prompt="], "--prompt is empty"),
    ],
)
def test_flags_are_checked(flags, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        script.parse_settings(train.Settings, [*flags, f"--out={tmp_path}"])


def test_more_context_than_the_checkpoint_has(made, text, tmp_path):
    flags = [f"--from={made / 'checkpoint'}", f"--text={text}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="--context is 17; expected at most 16, the checkpoint's"):
        train.run([*flags, "--context=17"])


def test_a_loss_that_is_not_finite_ends_the_run(made, text, tmp_path):
    poisoned = load_hugging_face(made / "checkpoint")
    arrays = to_arrays(poisoned)
    arrays["norm.weight"] = arrays["norm.weight"].at[3].set(np.nan)
    save_hugging_face(
        tmp_path / "poisoned", from_arrays(poisoned.config, arrays), copy_from=made / "checkpoint"
    )
    flags = [f"--from={tmp_path / 'poisoned'}", f"--text={text}", *RUN, f"--out={tmp_path / 'o'}"]
    with pytest.raises(SystemExit, match="train: step 1 has a loss of nan and a gradient norm of"):
        train.run(flags)
    assert not (tmp_path / "o" / "checkpoint").exists()
