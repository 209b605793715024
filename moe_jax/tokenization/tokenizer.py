"""A checkpoint's tokenizer: tokenizer.json, its special tokens and its chat template."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from moe_jax.json_files import local_path, read_object, read_text
from moe_jax.tokenization import chat_template

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
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; ids without a text, as models have at the end, give none."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def special_text(self, id_: int) -> str | None:
        """The text of a special token, which `decode` skips; None for any other id."""
        return self._special_texts.get(id_)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model expects.

        Args:
          messages: each {"role": ..., "content": ...}, and what else the template reads.
          add_generation_prompt: whether the text ends where the assistant begins to speak.
          tools: JSON schemas of functions.
          template: the name of one of chat_templates; None takes "tool_use" where there are tools
            and such a template, else "default".
          variables: what else the template is to see, enable_thinking=False for instance.

        Raises:
          ChatTemplateError: there is no such template, or it fails; names the file.
          ValueError: the messages are none.
        """
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if template not in self.chat_templates:
            raise chat_template.ChatTemplateError(
                f"{self._where} has no chat template {template!r}; it has "
                f"{', '.join(self.chat_templates) or 'none at all'}"
            )
        seen = chat_template.chat_variables(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            special_tokens=self.special_tokens,
            extra=variables,
        )
        where = f"chat template {template!r} of {self._where}"
        return chat_template.render(self.chat_templates[template], where, seen)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of render_chat's text; the same arguments."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is malformed; the message names it.
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
    config = read_object(directory / "tokenizer_config.json")
    return Tokenizer(
        backend,
        special_tokens=_special_tokens(config),
        chat_templates=_chat_templates(directory, config),
        where=str(directory),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL:
        value = config.get(name)
        if isinstance(value, Mapping):  # an added token spelt out, with its flags
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _chat_templates(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of the config, and of the files, which newer checkpoints have instead."""
    templates = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        templates = {item["name"]: item["template"] for item in value}
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates["default"] = read_text(file)
    for more in sorted(directory.glob("additional_chat_templates/*.jinja")):
        templates[more.stem] = read_text(more)
    return templates
