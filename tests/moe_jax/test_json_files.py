"""Paths as users write them, JSON that is hostile, and what lies in place of a file."""

import json
import pathlib
import shutil

import pytest

from moe_jax.generation import read_generation_defaults
from moe_jax.json_files import foreign_content, is_too_deep, local_path, read_json, read_object
from moe_jax.tokenization import load_tokenizer
from tests.moe_jax.checkpoints.hub import HTML, LFS

CHECKPOINT = pathlib.Path(__file__).parent / "generation" / "checkpoint"


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for written, expected in {
        "here": "here",
        "here/": "here",
        "./a/../b": "a/../b",  # a may be a link
        pathlib.Path("here"): "here",
        "~": "home",
        "~/models/x/": "home/models/x",
        "a/~": "a/~",
    }.items():
        assert local_path(written, "path") == tmp_path / expected
    assert local_path(tmp_path, "path") == tmp_path


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, "--to is ''; expected a path on this machine"),
        ("gs://bucket/x", ValueError, "--to is 'gs://bucket/x'; expected a path on this machine"),
        (pathlib.Path("https://hub/x"), ValueError, "expected a path on this machine"),
        ("a\0b", ValueError, "expected a path on this machine"),
        (None, TypeError, "--to is None; expected a path"),
        (3, TypeError, "--to is 3; expected"),
        (b"x", TypeError, "--to is b'x'; expected"),
    ],
)
def test_what_is_no_path(path, error, message):
    with pytest.raises(error, match=message):
        local_path(path, "--to")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("1" * 5000, "is not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "is nested too deep; expected at most 100 "),
        ('{"a":' * 100_000, "is nested too deep; expected at most 100 "),
        ("[" * 101 + "]" * 101, "is nested too deep; expected at most 100 "),
        ('{"a":' * 101 + "1" + "}" * 101, "is nested too deep; expected at most 100 "),
        (LFS, "is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`"),
        (HTML, "is an HTML or XML page, not the file itself"),
        ('<?xml version="1.0"?><Error>AccessDenied</Error>', "is an HTML or XML page"),
    ],
    ids=range(9),
)
def test_json_that_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (read_json, read_object):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path} is ")


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    assert read_object(path) == {}
    deepest = {"a": json.loads("[" * 99 + "]" * 99)}
    path.write_text(json.dumps(deepest))
    assert read_object(path) == deepest
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json holds a list; expected an object"):
        read_object(path)


def test_depth_of_what_is_shared_or_contains_itself():
    wide = []
    for _ in range(99):
        wide = [wide, wide]
    assert not is_too_deep(wide)
    assert is_too_deep((wide,))
    wide.append(wide)
    assert is_too_deep(wide)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("tokenizer.json", load_tokenizer),
        ("tokenizer_config.json", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
        ("generation_config.json", read_generation_defaults),
        ("config.json", read_generation_defaults),
    ],
)
def test_files_beside_the_weights(tmp_path, file, read):
    contents = {LFS: "a git-lfs pointer", HTML: "an HTML or XML page"}
    if file.endswith(".json"):
        contents["[" * 100_000] = "no tokenizer" if file == "tokenizer.json" else "nested too deep"
    for content, named in contents.items():
        shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=named) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / file} is {named}")


def test_weights_are_not_taken_for_a_page(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<h\0\0\0\0\0\0{}")  # a header of 0x683C bytes begins like this
    assert foreign_content(path) is None
