"""The script end to end, what it says of wrong flags, and its parts on checkpoints."""

import dataclasses
import io
import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import generate
from experiments.bench import script
from experiments.bench.generated_text import logprobs_report, printable, report, show_text
from experiments.generate import LoadedModel, generate_text, load_to_generate, prompt_ids
from moe_jax.checkpoints import save_hugging_face, save_orbax
from moe_jax.generation import Event, Generation, Sampling, TokenLogprobs
from moe_jax.generation import generate as generate_tokens
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import to_arrays
from moe_jax.presets import PRESETS
from moe_jax.sharding import MESH_AXES
from moe_jax.tokenization import ByteTokenizer, ChatTemplateError, load_tokenizer
from moe_jax.traces import load_trace

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "moe_jax" / "generation" / "checkpoint"


def parse(*flags, **changes):
    """Settings of a random model, with flags and fields changed."""
    flags = [*RANDOM, "--max_new_tokens=6", "--nowarm_up", *flags]
    settings = script.parse_settings(generate.Settings, flags)
    return dataclasses.replace(settings, **changes)


RANDOM = ("--preset=tiny", "--random", "--prompt=hello")


def test_script(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1))
    generate.run([*RANDOM, "--max_new_tokens=8", "--steps_per_dispatch=3", "--logprobs=2"])
    text, logprobs, figures = capsys.readouterr().out.split("\n\n")
    assert 0 < len(text) <= 8 * 4
    line = r"^ +\d +-\d+\.\d{4}  .+ -\d+\.\d{4}  .+ -\d+\.\d{4}$"
    assert len(re.findall(line, logprobs, re.MULTILINE)) == 8
    assert "rows: 1, prompt tokens: 5, new tokens: 8 (length 1)" in figures
    assert re.search(r"time to first token: [\d.]+ ms, compiled before", figures)
    assert re.search(r"decode: [\d.]+ tokens/s, 7 steps of [\d.]+ ms", figures)
    assert re.search(r"compiling and warming up: [\d.]+ s", figures)
    assert "cpu, jax " in figures


OF_A_CHECKPOINT = ("--checkpoint=x", "--prompt=a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["hello"], "generate takes flags only; left over: hello"),
        (["--prompt=a"], "--checkpoint and --random: neither given"),
        ([*RANDOM, "--checkpoint=x"], "--checkpoint and --random: both given"),
        (["--random", "--prompt=a"], "--preset is empty; expected one of tiny, qwen3_30b_a3b"),
        ([*RANDOM, "--preset=gpt"], "--preset is 'gpt'; expected one of tiny, qwen3_30b_a3b"),
        ([*OF_A_CHECKPOINT, "--preset=tiny"], "--preset is 'tiny' with --checkpoint"),
        (["--checkpoint=s3://x", "--prompt=a"], "--checkpoint is 's3:/x'; expected a path on this"),
        (["--checkpoint=/nowhere", "--prompt=a"], "/nowhere is no directory; expected a checkp"),
        (["--checkpoint=x"], "--prompt, --prompt_file and --prompt_tokens: 0 given"),
        ([*RANDOM, "--prompt_tokens=3"], "--prompt, --prompt_file and --prompt_tokens: 2 given"),
        ([*RANDOM, "--prompt="], "--prompt is empty"),
        (["--checkpoint=x", "--prompt_file=/nowhere"], "--prompt_file is '/nowhere'; expected a"),
        ([*RANDOM, "--chat"], "--chat is given with --random"),
        (["--checkpoint=x", "--chat", "--prompt_tokens=3"], "--chat is given with --prompt_tokens"),
        ([*RANDOM, "--system=Be brief."], "--system is 'Be brief.' without --chat"),
        ([*RANDOM, "--noenable_thinking"], "--enable_thinking is False without --chat; expected"),
        ([*RANDOM, "--batch=0"], "--batch is 0; expected 1 to"),
        ([*RANDOM, "--max_new_tokens=0"], "--max_new_tokens is 0; expected 1 to"),
        ([*RANDOM, "--prefill_chunk=0"], "--prefill_chunk is 0; expected 1 to"),
        ([*RANDOM, "--steps_per_dispatch=0"], "--steps_per_dispatch is 0; expected 1 to"),
        ([*RANDOM, "--logprobs=-1"], "--logprobs is -1; expected 0 to"),
        ([*RANDOM, "--logprobs=513"], "logprobs is 513; expected a whole number from 0 to 512"),
        ([*RANDOM, "--seed=-1"], "--seed is -1; expected 0 to"),
        ([*RANDOM, "--top_k=-1"], "--top_k is -1; expected a whole number"),
        ([*RANDOM, "--temperature=-1"], "--temperature is -1.0; expected"),
        ([*RANDOM, "--top_p=0.9"], "--top_p is 0.9, but choices are greedy"),
        ([*RANDOM, "--stop=a", "--stop="], "--stop is empty"),
        ([*RANDOM, "--dtype=fp8"], "--dtype is 'fp8'; expected one of bfloat16, float32"),
        ([*RANDOM, "--experts_backend=cuda"], "--experts_backend is 'cuda'; expected one of auto"),
        ([*RANDOM, "--decode_backend=cuda"], "--decode_backend is 'cuda'; expected one of auto"),
        ([*RANDOM, "--capture_trace=/nowhere/t.npz"], "--capture_trace is '/nowhere/t.npz'; expec"),
        ([*RANDOM, "--capture_trace=t.npz", "--max_new_tokens=1"], "--max_new_tokens is 1; expect"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(flags, message):
    with pytest.raises(SystemExit) as stopped:
        generate.run(flags)
    assert str(stopped.value).startswith("generate: ") or "left over" in str(stopped.value)
    assert message.removeprefix("generate ") in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_file_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("two\nlines", encoding="utf-8")
    settings = script.parse_settings(
        generate.Settings, ["--random", "--preset=tiny", f"--prompt_file={tmp_path / 'p.txt'}"]
    )
    assert settings.prompts() == ("two\nlines",)


def test_sampling_flags_go_over_the_checkpoints():
    defaults = Sampling(temperature=0.6, top_k=20, top_p=0.95)
    settings = parse("--temperature=0.9")
    assert settings.sampling_over(defaults) == dataclasses.replace(defaults, temperature=0.9)
    assert parse("--temperature=0").sampling_over(defaults).temperature == 0
    asked = script.parse_settings(
        generate.Settings, [*OF_A_CHECKPOINT, "--temperature=0", "--top_k=3"]
    )
    with pytest.raises(ValueError, match="--top_k is 3, but choices are greedy"):
        asked.sampling_over(defaults)


@pytest.mark.parametrize("thinking", [None, False, True])
def test_enable_thinking_is_for_the_chat_template(thinking):
    tokenizer = load_tokenizer(TOKENIZER)
    asked = of_checkpoint("x", chat=True, prompt=("hi",), enable_thinking=thinking)
    rows = prompt_ids(asked, LoadedModel(model=None, tokenizer=tokenizer, defaults=None))
    given = {} if thinking is None else {"enable_thinking": thinking}
    assert rows == [tokenizer.encode_chat([{"role": "user", "content": "hi"}], **given)]
    assert tokenizer.decode(rows[0]).endswith("</think>\n\n") == (thinking is False)


def test_random_prompt_tokens():
    asked = parse(prompt=(), prompt_tokens=20, batch=3, seed=4)
    model = LoadedModel(model=_Config, tokenizer=None, defaults=None)
    rows = prompt_ids(asked, model)
    assert [len(row) for row in rows] == [20] * 3
    assert rows[0] != rows[1] and rows == prompt_ids(asked, model)
    assert all(0 <= id_ < 512 for row in rows for id_ in row)


class _Config:
    config = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model():
    fields = {"num_hidden_layers": 1, "initializer_range": 0.1, "extra": {"eos_token_id": 5}}
    config = dataclasses.replace(PRESETS["tiny"], **fields)
    return Qwen3Moe(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


@pytest.fixture(scope="module", params=["hugging_face", "orbax"])
def checkpoint(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    {"hugging_face": save_hugging_face, "orbax": save_orbax}[request.param](folder, model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


# With these, every prompt runs the same two compiled functions.
SHAPES = {"prefill_chunk": 16}


def of_checkpoint(folder, **changes):
    of_file = {"checkpoint": pathlib.Path(folder), "preset": None, "random": False}
    return parse(**of_file | SHAPES | changes)


def test_checkpoint(checkpoint, model):
    asked = of_checkpoint(checkpoint, chat=True, system="Be brief.", prompt=("hi",))
    loaded = load_to_generate(asked)
    assert loaded.defaults.stop_ids == (5,)
    assert loaded.defaults.sampling == Sampling()
    tokenizer = load_tokenizer(TOKENIZER)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    ids = tokenizer.encode_chat(messages)
    assert prompt_ids(asked, loaded) == [ids]
    out = io.StringIO()
    made = generate_text(asked, out)
    options = {"stop_ids": [5], "tokenizer": tokenizer, "capacity": 64}
    expected = generate_tokens(model, [ids], max_new_tokens=6, **options, **SHAPES)
    assert made.tokens == expected.tokens
    assert out.getvalue().startswith(printable(expected.texts[0]) + "\n")


def test_defaults_of_a_checkpoint_and_flags_over_them(checkpoint, model):
    file = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": [3, 4]}
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(file))
    try:
        loaded = load_to_generate(of_checkpoint(checkpoint))
        assert loaded.defaults.stop_ids == (3, 4)
        assert loaded.defaults.sampling == Sampling(temperature=0.5, top_k=7)
        # nothing is loaded for flags that do not fit the checkpoint
        bad = of_checkpoint(checkpoint, temperature=0.0, top_k=3)
        with pytest.raises(ValueError, match="--top_k is 3, but choices are greedy"):
            load_to_generate(bad)
    finally:
        path.unlink()


def test_end_tokens_and_stop_strings(checkpoint, model):
    ids = load_tokenizer(TOKENIZER).encode("hello")
    plain = generate_tokens(model, [ids], max_new_tokens=6).tokens[0]
    end, unused = plain[2], next(id_ for id_ in range(512) if id_ not in plain)
    text = load_tokenizer(TOKENIZER).decode(plain)
    stop = next(character for character in text if character != "\N{REPLACEMENT CHARACTER}")
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": end}))
    try:
        made = generate_text(of_checkpoint(checkpoint), io.StringIO())
        assert made.tokens == [plain[: plain.index(end) + 1]]
        assert made.finish_reasons == ["stop_id"]
        path.write_text(json.dumps({"eos_token_id": unused, "stop_strings": stop}))
        of_file = generate_text(of_checkpoint(checkpoint), io.StringIO())
        made = generate_text(of_checkpoint(checkpoint, ignore_eos=True), io.StringIO())
        assert (made.tokens, made.finish_reasons) == ([plain], ["length"])
    finally:
        path.unlink()
    of_flag = generate_text(of_checkpoint(checkpoint, stop=(stop,), ignore_eos=True), io.StringIO())
    for made in (of_file, of_flag):
        assert made.texts == [text.partition(stop)[0]]
        assert made.finish_reasons == ["stop_string"]


def test_checkpoint_without_tokenizer_or_template(model, tmp_path):
    save_hugging_face(tmp_path / "m", model)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_to_generate(of_checkpoint(tmp_path / "m"))
    asked = of_checkpoint(tmp_path / "m", prompt=(), prompt_tokens=4)
    assert load_to_generate(asked).tokenizer is None
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "m")
    asked = of_checkpoint(tmp_path / "m", chat=True)
    with pytest.raises(ChatTemplateError, match="has no chat template 'default'"):
        prompt_ids(asked, load_to_generate(asked))


def test_random_model_with_trace(model, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", model.config)  # the weights, too, are of one seed
    path = tmp_path / "t.npz"
    out = io.StringIO()
    made = generate_text(parse(dtype="float32", capture_trace=path, **SHAPES), out)
    again = generate_tokens(model, [list(b"hello")], max_new_tokens=6, capture=True)
    assert made.tokens == again.tokens
    np.testing.assert_array_equal(load_trace(path).expert_ids, again.trace.expert_ids)
    assert out.getvalue().startswith(printable(made.texts[0]) + "\n")
    assert "rows: 1, prompt tokens: 5, new tokens: 6 (length 1)" in out.getvalue()
    assert f"wrote {path}" in out.getvalue()


def test_logprobs_are_shown_for_every_token_as_text_where_it_has_one():
    first = TokenLogprobs(chosen=-0.5, top=((104, -0.5), (300, -1.25)))
    second = TokenLogprobs(chosen=-2.0, top=((32, -0.25), (27, -3.0)))
    made = Generation(
        tokens=[[104, 300]],
        texts=["h"],
        finish_reasons=["length"],
        first_token_seconds=0.0,
        decode_seconds=0.0,
        decode_steps=1,
        logprobs=[[first, second]],
    )
    lines = logprobs_report(made, ByteTokenizer(512)).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["0", "-0.5000", "'h'", "'h'", "-0.5000", "300", "-1.2500"],
        ["1", "-2.0000", "300", "'", "'", "-0.2500", "27", "-3.0000"],
    ]
    assert logprobs_report(made, None).splitlines()[2].split()[2] == "104"
    assert logprobs_report(dataclasses.replace(made, logprobs=None), None) == ""


def test_rows_of_a_batch():
    rows = prompt_ids(
        parse(prompt=("a", "bc"), batch=2),
        LoadedModel(model=None, tokenizer=ByteTokenizer(256), defaults=None),
    )
    assert rows == [[97], [97], [98, 99], [98, 99]]


def event(row, text):
    return Event(row=row, index=0, token_id=0, text=text, finish_reason=None, seconds=0.0)


def test_row_0_is_written_as_it_comes_and_the_others_at_the_end():
    out = io.StringIO()
    events = show_text(iter([event(0, "a"), event(1, "x"), event(0, "b")]), 2, out)
    next(events)
    assert out.getvalue() == "--- row 0\na"
    next(events)
    next(events)
    assert out.getvalue() == "--- row 0\nab"
    assert list(events) == []
    assert out.getvalue() == "--- row 0\nab\n--- row 1\nx\n"


def test_nothing_that_steers_a_terminal_is_printed():
    assert printable("a\x1b[31m\x07\x9b\n\tß😀") == "a�[31m��\n\tß😀"


def test_report_without_a_decode_step():
    made = Generation(
        tokens=[[1], [2]],
        texts=["", ""],
        finish_reasons=["length", "stop_id"],
        first_token_seconds=0.25,
        decode_seconds=0.0,
        decode_steps=0,
    )
    text = report(made, [[1, 2], [3, 4]], None)
    assert "prompt tokens: 2, new tokens: 2 (length 1, stop_id 1)" in text
    assert "time to first token: 250.0 ms, compiling included" in text
    assert "decode" not in text


def test_a_model_is_loaded_onto_the_mesh_that_flags_say():
    """On one device here, where the parts are the whole."""
    settings = generate.Settings(
        preset="tiny", random=True, prompt_tokens=1, mesh=("data=1", "expert=1")
    )
    arrays = to_arrays(load_to_generate(settings).model)
    assert {array.sharding.mesh.axis_names for array in arrays.values()} == {MESH_AXES}
    with pytest.raises(ValueError, match="expected 64 for data 1, expert 64, tensor 1"):
        load_to_generate(dataclasses.replace(settings, mesh=("expert=64",)))
