"""JSON and other small files beside a checkpoint's weights, and paths as users write them."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

# Published files are 4 levels deep. Deeper values than this end in a RecursionError somewhere: in
# json, in a comparison, in the text of an error.
_MAX_DEPTH = 100
TOO_DEEP = f"nested too deep; expected at most {_MAX_DEPTH} objects or lists inside each other"

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def local_path(path: str | os.PathLike, name: str) -> pathlib.Path:
    """The absolute path; a leading ~ or ~user is a home directory, and links stay links.

    Raises:
      TypeError: it is no path; the message begins with `name`, the argument's.
      ValueError: it is empty, or the address of another machine.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"{name} is {path!r}; expected a path")
    if not text or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text) or "\0" in text:
        raise ValueError(f"{name} is {text!r}; expected a path on this machine")
    return pathlib.Path(os.path.expanduser(text)).absolute()


def foreign_content(path: pathlib.Path) -> str | None:
    """Says what a file is that lies in place of the one wanted; None if it is neither of these.

    A clone without git-lfs leaves pointers, and a download that needs a login leaves HTML.
    """
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(_GIT_LFS):
        return "is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`"
    if _MARKUP.match(start):
        return "is an HTML or XML page, not the file itself; download that anew"
    return None


def is_too_deep(value: Any) -> bool:
    """Whether more than 100 lists and mappings lie inside each other."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        # by identity, because what two lists share must not be counted 2 ** depth times
        inside = {id(item): item for node in level for item in _items(node)}
        if not inside:
            return False
        level = list(inside.values())
    return any(isinstance(node, (Mapping, list, tuple)) for node in level)


def _items(node: Any) -> Iterable[Any]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, (list, tuple)) else ()


def read_text(path: pathlib.Path) -> str:
    """The text of a file in UTF-8.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or foreign_content; the message names the file.
    """
    if foreign := foreign_content(path):
        raise ValueError(f"{path} {foreign}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: pathlib.Path) -> Any:
    """The value in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is foreign_content, no JSON, or nested too deep; names the file.
    """
    if foreign := foreign_content(path):
        raise ValueError(f"{path} {foreign}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is {TOO_DEEP}") from None
    except ValueError as error:  # integers of more than 4300 digits among them
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if is_too_deep(data):
        raise ValueError(f"{path} is {TOO_DEEP}")
    return data


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
      ValueError: as read_json, or it holds something else; the message names the file.
    """
    if not path.is_file():
        return {}
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected an object")
    return data
