"""Chat templates: Jinja programs that come with a checkpoint, rendered in jinja2's sandbox.

A template is code of the checkpoint's authors. It runs in the immutable sandbox, and all that it is
given has been through JSON, so that it meets no object with methods of its own. Options, filters
and globals are those that templates on the hub are written for.
"""

import contextlib
import datetime
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils


class ChatTemplateError(ValueError):
    """A template that cannot be parsed, fails, refuses the messages, or reaches for too much."""


# What an expression in a template can raise, "a" + 1 for instance.
_OF_THE_TEMPLATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


# Names of an assistant's thoughts in a message, the one that most templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(template: str, where: str, variables: Mapping[str, Any]) -> str:
    """Renders a template.

    Args:
      template: its source.
      where: the file, for messages.
      variables: what the template sees, made of what JSON can hold.

    Raises:
      ChatTemplateError: see there; the message names the file and, where known, the line.
      TypeError: a variable is nothing that JSON can hold.
    """
    plain = {name: _plain(where, name, value) for name, value in variables.items()}
    with _errors_of(where):
        return _compiled(template).render(plain)


def render_to_continue(template: str, where: str, variables: Mapping[str, Any], field: str) -> str:
    """Renders a template up to where the text of the last message ends.

    A marker is put behind that text and looked for in what is rendered. Where the template strips
    the message, white space at its end goes too, as transformers has it.

    Args:
      template, where, variables: as in `render`.
      field: the message's, "content" or one of its thoughts.

    Raises:
      ChatTemplateError, TypeError: as `render`; also if the text is not in what is rendered.
      ValueError: the last message has no text in this field.
    """
    messages = _plain(where, "messages", variables["messages"])
    text = _text_of(messages[-1], field)
    numbers = (f"CONTINUE_HERE_{number}_" for number in itertools.count())
    marker = next(marker for marker in numbers if marker not in json.dumps(messages))
    # A thought is in the message under several names, and a template may read any of them.
    names = [name for name in _REASONING if messages[-1].get(name) == messages[-1][field]]
    for name in names if field in _REASONING else [field]:
        messages[-1][name] = _with_end(messages[-1][name], marker + " ")
    made = render(template, where, {**variables, "messages": messages})
    before, found, after = made.rpartition(marker)
    if not found or text.strip() not in before:
        raise ChatTemplateError(
            f"{where} does not render {field} of the last message as it is, which "
            f"continue_final_message needs: {text!r}"
        )
    return before if after.startswith(" ") else before.rstrip()


@functools.lru_cache(maxsize=16)
def variables_of(template: str, where: str) -> frozenset[str]:
    """The names that a template looks up in what it is given.

    Raises:
      ChatTemplateError: it cannot be parsed.
    """
    with _errors_of(where):
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))


def _plain(where: str, name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{where}: {name} must be plain JSON: {error}") from None


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"{where}, line {error.lineno}: {error.message}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ChatTemplateError(f"{where}: the sandbox refuses it: {error}") from error
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"{where}: {error}") from error
    except _OF_THE_TEMPLATE as error:
        raise ChatTemplateError(f"{where}: {type(error).__name__}: {error}") from error


def _text_of(message: Mapping[str, Any], field: str) -> str:
    """The text of a field: a string, or the last text among its blocks."""
    value = message.get(field)
    blocks = value if isinstance(value, list) else [{"text": value}]
    texts = [block["text"] for block in blocks if isinstance(block, dict) and "text" in block]
    if not texts or not isinstance(texts[-1], str):
        raise ValueError(
            f"the last message has {value!r} as {field}; expected text that continue_final_message "
            "can go on with"
        )
    return texts[-1]


def _with_end(value: str | list, end: str) -> str | list:
    if isinstance(value, str):
        return value + end
    last = max(place for place, block in enumerate(value) if "text" in block)
    return [*value[:last], {**value[last], "text": value[last]["text"] + end}, *value[last + 1 :]]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> "_Sandbox":
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which by itself renders what is forbidden as nothing, and then goes on."""

    def unsafe_undefined(self, obj, attribute):
        raise jinja2.sandbox.SecurityError(
            f"attribute {attribute!r} of a {type(obj).__name__} is out of reach"
        )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant says, for training; here only its content."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`, without names that Python itself looks up on an object."""

    def __init__(*arguments, **attributes):
        self, *others = arguments  # as `self` may be an attribute's name
        attributes = dict(*others, **attributes)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(
            f"namespace attribute {name!r}; expected a name without a leading underscore"
        )


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own escapes <, > and & for HTML, which a prompt is not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates expect them.

    Templates ask whether a key is there, so an absent one and None must look alike to them. A
    thought may be under any of its names, so `reasoning_content` and `thinking` are filled, which
    templates read: as transformers does, from the first of _REASONING that is there.

    Raises:
      ValueError: there is no message, or one has no role.
    """
    rows = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    if not rows or len(messages) == 0:
        raise ValueError(f"messages is {messages!r}; expected at least one message, in a list")
    made = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"messages[{place}] is {message!r}; expected a mapping with role and content"
            )
        present = {key: value for key, value in message.items() if value is not None}
        thought = next((present[name] for name in _REASONING if name in present), None)
        if thought is not None:
            present = {"thinking": thought, **present, "reasoning_content": thought}
        made.append(present)
    return made
