"""Tokenizers and chat templates: equal to transformers', sandboxed, with errors that say where."""

import datetime
import json
import pathlib
import shutil

import pytest

from moe_jax.tokenization import ByteTokenizer, ChatTemplateError, load_tokenizer

CHECKPOINT = pathlib.Path(__file__).with_name("checkpoint")
GOLDENS = json.loads(CHECKPOINT.with_name("chat_goldens.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("golden", GOLDENS["chats"], ids=lambda golden: golden["name"])
def test_chats_as_transformers_renders_them(tokenizer, golden):
    assert tokenizer.render_chat(**golden["arguments"]) == golden["text"]
    assert tokenizer.encode_chat(**golden["arguments"]) == golden["ids"]


@pytest.mark.parametrize("golden", GOLDENS["texts"], ids=lambda golden: repr(golden["text"]))
def test_texts_as_transformers_has_them(tokenizer, golden):
    ids = golden["ids"]
    assert tokenizer.encode(golden["text"]) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == golden["decoded"]
    assert tokenizer.decode(ids) == golden["decoded_without_special"]


def test_special_ids(tokenizer):
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.eos_id == tokenizer.encode("<|im_end|>")[0]
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_files_may_ask_for_truncation_and_padding_in_vain(folder, tokenizer):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "max_length": 2,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(folder).encode("The token's") == tokenizer.encode("The token's")


def with_template(folder, source):
    (folder / "chat_template.jinja").write_text(source)
    return load_tokenizer(folder)


def test_templates_of_the_config(folder):
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**config, "chat_template": "one {{ eos_token }}"}))
    assert load_tokenizer(folder).render_chat(USER) == "one <|im_end|>"
    several = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b{{ tools }}"},
    ]
    path.write_text(json.dumps({**config, "chat_template": several}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(USER) == "a"
    assert tokenizer.render_chat(USER, tools=[{}]) == "b[{}]"
    assert tokenizer.render_chat(USER, template="tool_use") == "bNone"
    # the file wins, as newer checkpoints have it
    assert with_template(folder, "file").render_chat(USER) == "file"


def test_no_template(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match=r"has no chat template 'default'; it has none"):
        load_tokenizer(folder).render_chat(USER)


CONTINUED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b  "}]
BLOCKS = [{"type": "text", "text": "x"}, {"type": "text", "text": "y "}, {"type": "image"}]


@pytest.mark.parametrize(
    ("source", "messages", "field", "text"),
    [  # what transformers 5.23 renders of them
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", CONTINUED, True, "<a>< b  "),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", CONTINUED, True, "<a><b"),
        (
            "{% for block in messages[0].content %}[{{ block.text }}]{% endfor %}",
            [{"role": "assistant", "content": BLOCKS}],
            True,
            "[x][y ",
        ),
        (
            "{{ messages[0].thinking }}|{{ messages[0].content }}",
            [{"role": "assistant", "content": "c", "reasoning_content": "t "}],
            "reasoning_content",
            "t ",
        ),
        (  # what looks like the marker is text like any other
            "{{ messages[0].content }}!",
            [{"role": "assistant", "content": "CONTINUE_HERE_0_"}],
            "content",
            "CONTINUE_HERE_0_",
        ),
    ],
)
def test_the_final_message_is_continued(folder, source, messages, field, text):
    made = with_template(folder, source).render_chat(messages, continue_final_message=field)
    assert made == text


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (
            "{{ messages[0].content | upper }}",
            {"continue_final_message": True},
            ChatTemplateError,
            "does not render content of the last message as it is.*'hi'",
        ),
        (
            "{{ messages }}",
            {"continue_final_message": "thinking"},
            ValueError,
            "the last message has None as thinking; expected text",
        ),
        (
            "{{ messages }}",
            {"continue_final_message": True, "add_generation_prompt": True},
            ValueError,
            "continue_final_message is True and add_generation_prompt is True; expected one of",
        ),
        (
            "{{ enable_thinking }}{{ messages }}",
            {"enable_thinkng": False},
            ChatTemplateError,
            "does not read enable_thinkng, which is False; it reads enable_thinking, messages",
        ),
        ("{{ messages }}", {"tools": [{}]}, ChatTemplateError, "does not read tools, which is"),
        ("{{ messages }}", {"documents": [{}]}, ChatTemplateError, "does not read documents"),
        ("{{ tools }}", {"tools": "a"}, TypeError, "tools is 'a'; expected a sequence of mapp"),
        ("{{ tools }}", {"tools": [3]}, TypeError, r"tools is \[3\]; expected a sequence of mapp"),
        ("a", {"add_generation_prompt": "no"}, TypeError, "add_generation_prompt is 'no'; exp"),
        ("a", {"continue_final_message": None}, TypeError, "continue_final_message is None; exp"),
        ("a", {"template": 5}, TypeError, "template is 5; expected str"),
    ],
)
def test_chat_arguments_that_would_be_lost(folder, source, options, error, message):
    with pytest.raises(error, match=message):
        with_template(folder, source).render_chat(USER, **options)


def test_variables_that_a_template_only_sets_if_they_are_absent(folder):
    source = "{% if not mood is defined %}{% set mood = 'calm' %}{% endif %}{{ mood }}"
    tokenizer = with_template(folder, source)
    assert tokenizer.render_chat(USER) == "calm"
    assert tokenizer.render_chat(USER, mood="brisk") == "brisk"
    assert tokenizer.render_chat(USER, tools=[], documents=None) == "calm"  # nothing is lost


def test_strftime_now(folder):
    made = with_template(folder, "{{ strftime_now('%Y') }}").render_chat(USER)
    assert abs(int(made) - datetime.datetime.now().year) <= 1


ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "attribute filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format string": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "changing an argument": "{{ messages.append(1) }}",
    "method of a dict": "{{ messages[0].update(role='x') }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__html__ = raise_exception %}{{ ns }}",
    "namespace argument": "{{ namespace(__call__=raise_exception) }}",
    "endless range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "import": "{% import 'os' as os %}{{ os }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_reaches_out_of_the_sandbox_is_refused(folder, name):
    tokenizer = with_template(folder, ESCAPES[name])
    with pytest.raises(ChatTemplateError, match=r"chat template 'default' of"):
        tokenizer.render_chat(USER)


def test_what_a_template_does_to_its_arguments_stays_inside(folder):
    messages = [{"role": "user", "content": "hi", "more": ["x"]}]
    with_template(folder, "{{ messages[0].more }}").render_chat(messages)
    assert messages == [{"role": "user", "content": "hi", "more": ["x"]}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("a\n{% if %}", ", line 2: Expected"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.more }}", "'nothing' is undefined"),
    ],
)
def test_errors_of_a_template_name_it(folder, source, message):
    with pytest.raises(ChatTemplateError, match=message) as raised:
        with_template(folder, source).render_chat(USER)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, r"messages is \[\]; expected at least one"),
        ("hi", ValueError, "messages is 'hi'; expected at least one"),
        (None, ValueError, "messages is None; expected at least one"),
        (["hi"], ValueError, r"messages\[0\] is 'hi'; expected a mapping with role"),
        ([{"content": "hi"}], ValueError, r"messages\[0\] is .*role"),
        ([{"role": "user", "content": object()}], TypeError, "must be plain JSON"),
    ],
)
def test_messages_that_are_none(tokenizer, messages, error, message):
    with pytest.raises(error, match=message):
        tokenizer.render_chat(messages)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist; expected"):
        load_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="directory is None; expected a path"):
        load_tokenizer(None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is nested too deep"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_arguments(tokenizer, kind):
    tokenizer = tokenizer if kind == "bpe" else ByteTokenizer(256)
    for text in (5, None, b"a"):
        with pytest.raises(TypeError, match=f"text is {text}; expected a string"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"text\[1\] is '\\udcff'; expected UTF-8"):
        tokenizer.encode("a\udcff")  # a byte of a shell's argument that is no UTF-8
    for ids in (5, None, [None], [1.5], "ab"):
        with pytest.raises(TypeError, match=r"ids is .*; expected a sequence of token ids"):
            tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 5}, "chat_template has .*5.*; expected text, or a list of objects"),
        ({"chat_template": [{"name": "a"}]}, "chat_template has {'name': 'a'}; expected text"),
        ({"eos_token": 5}, "eos_token is 5; expected a token's text, or null"),
    ],
)
def test_configs_that_are_none(folder, config, message):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(folder)


def test_bytes():
    tokenizer = ByteTokenizer(512)
    assert tokenizer.encode("aß") == [0x61, 0xC3, 0x9F]
    assert tokenizer.decode([0x61, 0xC3, 0x9F]) == "aß"
    assert tokenizer.decode([0x61, 0xC3, 300, -1]) == "a���"
    with pytest.raises(ValueError, match="vocab_size is 255; expected at least 256"):
        ByteTokenizer(255)
