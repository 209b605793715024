"""Chat templates: Jinja programs that come with a checkpoint, rendered in jinja2's sandbox.

A template is code from whoever made the checkpoint. It runs in the immutable sandbox, and all that
it is given has been through JSON, so that it meets no object with methods of its own. Options,
filters and globals are those that templates on the hub are written for.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
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
    try:
        plain = json.loads(json.dumps(variables))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: messages and variables must be plain JSON: {error}") from None
    try:
        return _environment().from_string(template).render(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"{where}, line {error.lineno}: {error.message}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ChatTemplateError(f"{where}: the sandbox refuses it: {error}") from error
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"{where}: {error}") from error
    except _OF_THE_TEMPLATE as error:
        raise ChatTemplateError(f"{where}: {type(error).__name__}: {error}") from error


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


def chat_variables(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What a template sees of a conversation.

    Raises:
      ValueError: there is no message, or one has no role.
    """
    if isinstance(messages, (str, Mapping)) or len(messages) == 0:
        raise ValueError(f"messages is {messages!r}; expected at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"messages[{place}] is {message!r}; expected a mapping with role and content"
            )
    # Templates ask whether a key is there, so an absent one and None must look alike to them.
    present = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    return {
        **special_tokens,
        "messages": present,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
