"""A checkpoint's tokenizer: tokenizer.json, its special tokens and its chat template."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from moe_jax.json_files import local_path, read_object, read_text
from moe_jax.tokenization import chat_template
from moe_jax.tokenization.byte_tokenizer import utf8

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      special_tokens: the text of bos_token, eos_token, pad_token and so on, those there are.
      special_ids: their ids.
      chat_templates: source by name; the usual one is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        where: str,
    ):
        # A file may ask to cut or fill up what is encoded; a prompt must be neither.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        ids = {name: backend.token_to_id(text) for name, text in special_tokens.items()}
        self.special_ids = {name: id_ for name, id_ in ids.items() if id_ is not None}
        self._special_texts = {
            id_: token.content
            for id_, token in backend.get_added_tokens_decoder().items()
            if token.special
        }

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; a model's vocab_size is often larger."""
        return self._backend.get_vocab_size()

    @property
    def eos_id(self) -> int | None:
        return self.special_ids.get("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens written out in it become the tokens they name.

        Args:
          text: what to encode.
          add_special_tokens: whether to put around it what the file says (Qwen3: nothing). Not for
            the text of a chat template, which has written them already.

        Raises:
          TypeError: text is no string.
          ValueError: it has half of a surrogate pair.
        """
        utf8(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; ids without a text, as models have at the end, give none.

        Raises:
          TypeError: ids is no sequence of whole numbers from 0 up.
        """
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError):
            raise TypeError(
                f"ids is {ids!r}; expected a sequence of token ids from 0 to {2**32 - 1}"
            ) from None

    def special_text(self, id_: int) -> str | None:
        """The text of a special token, which `decode` skips; None for any other id."""
        return self._special_texts.get(id_)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model expects.

        Args:
          messages: each {"role": ..., "content": ...}, and what else the template reads. What the
            assistant thought may be under reasoning_content, thinking or reasoning.
          add_generation_prompt: whether the text ends where the assistant begins to speak. None: it
            does, unless the final message is to be continued.
          continue_final_message: whether the text ends with the last message's, for the model to go
            on with it; or the name of the message's field that it ends with, if not "content".
          tools: JSON schemas of functions.
          documents: what the answer may draw on, for templates that read documents.
          template: the name of one of chat_templates; None takes "tool_use" where there are tools
            and such a template, else "default".
          variables: what else the template is to see, enable_thinking=False for instance.

        Raises:
          ChatTemplateError: there is no such template, it fails, or it does not read what it is
            given; names the file.
          ValueError: the messages are none, or the arguments exclude each other.
          TypeError: an argument is of another type, or not plain JSON.
        """
        _check_kind("add_generation_prompt", add_generation_prompt, bool | None)
        _check_kind("continue_final_message", continue_final_message, bool | str)
        _check_kind("template", template, str | None)
        continues = continue_final_message is not False
        if add_generation_prompt and continues:
            raise ValueError(
                f"continue_final_message is {continue_final_message!r} and add_generation_prompt "
                "is True; expected one of them, because a new turn ends the one to go on with"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continues
        named = {"tools": tools, "documents": documents}
        for name, value in named.items():
            _check_mappings(name, value)
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        given = {name: value for name, value in named.items() if value} | variables
        source, where = self._template(template, given)
        seen = {
            **self.special_tokens,
            **named,
            "messages": chat_template.chat_messages(messages),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        if not continues:
            return chat_template.render(source, where, seen)
        field = "content" if continue_final_message is True else continue_final_message
        return chat_template.render_to_continue(source, where, seen, field)

    def _template(self, name: str, given: Mapping[str, Any]) -> tuple[str, str]:
        """A template's source and what to call it in errors; checks that it reads what is given."""
        if name not in self.chat_templates:
            raise chat_template.ChatTemplateError(
                f"{self._where} has no chat template {name!r}; it has "
                f"{', '.join(self.chat_templates) or 'none at all'}"
            )
        where = f"chat template {name!r} of {self._where}"
        reads = chat_template.variables_of(self.chat_templates[name], where)
        for unread in sorted(given.keys() - reads):
            raise chat_template.ChatTemplateError(
                f"{where} does not read {unread}, which is {given[unread]!r}; it reads "
                f"{', '.join(sorted(reads)) or 'nothing'}"
            )
        return self.chat_templates[name], where

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of render_chat's text; the same arguments."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; expected {kind}")


def _check_mappings(name: str, value: Any) -> None:
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if value is not None and not (several and all(isinstance(item, Mapping) for item in value)):
        raise TypeError(f"{name} is {value!r}; expected a sequence of mappings, or None")


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is malformed; the message names it.
      TypeError: directory is no path.
    """
    directory = local_path(directory, "directory")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a Hugging Face tokenizer.json (vocab.json with "
            "merges.txt alone is not read)"
        )
    text = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is no tokenizer of the `tokenizers` library: {error}") from error
    config_path = directory / "tokenizer_config.json"
    config = read_object(config_path)
    try:
        special_tokens, chat_templates = _special_tokens(config), _chat_templates(config)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_templates=chat_templates | _chat_template_files(directory),
        where=str(directory),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL:
        value = config.get(name)
        # An added token may be spelt out, with its flags.
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[name] = text
        elif value is not None:
            raise ValueError(f"{name} is {value!r}; expected a token's text, or null")
    return tokens


def _chat_templates(config: Mapping[str, Any]) -> dict[str, str]:
    value = config.get("chat_template")
    if value is None:
        return {}
    items = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for item in items:
        names = [item.get(key) for key in ("name", "template")] if isinstance(item, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"chat_template has {item!r}; expected text, or a list of objects with name and "
                "template"
            )
    return {item["name"]: item["template"] for item in items}


def _chat_template_files(directory: pathlib.Path) -> dict[str, str]:
    """The templates of files, which newer checkpoints have instead of the config's."""
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files = {"default": directory / "chat_template.jinja"} | files
    return {name: read_text(path) for name, path in sorted(files.items())}
