"""README and docs/ hold: README's size, links, snippets, commands, the files that they name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
# The lab log and the records' own tables keep the commands of their day.
CURRENT = [README, ROOT / "docs" / "backends.md", ARCHITECTURE, ROOT / "docs" / "limits.md"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
# Folders of which architecture.md names every file.
LISTED_WHOLE = tuple(
    f"pallas_kernels/{folder}"
    for folder in ("decode_attention", "decode_experts", "decode_step", "mosaic")
)

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
each_current = pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.stem)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Local links of a page whose file or whose heading is not there."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def missing_imports(source: str) -> list[str]:
    """The import statements of a snippet that fail."""
    missing = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            try:
                exec(ast.unparse(node), {})
            except ImportError:
                missing.append(ast.unparse(node))
    return missing


def unknown_commands(text: str) -> list[str]:
    """Scripts, flags and make targets in a page's code that this tree has not."""
    code = "\n".join(body for _, body in FENCE.findall(text))
    code += "\n".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))
    scripts = "".join(path.read_text() for path in (ROOT / "experiments").rglob("*.py"))
    # As DEFINE_bool("name", ...) or as a Settings field, name: bool = flag(...).
    known = set(re.findall(r'"(\w+)"|^    (\w+): .* = flag\(', scripts, re.MULTILINE))
    known = {name for pair in known for name in pair} | {"help"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = []
    for line in code.split("\n"):
        command = line.partition("  #")[0]
        unknown += [t for t in re.findall(r"^make (\w+)", command) if t not in targets]
        modules = re.findall(r"-m ((?:experiments|notebooks)\.\w+)", command)
        unknown += [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").exists()]
        if modules or command.startswith("make "):
            flags = re.findall(r"(?<![\w-])--(\w+)", command)
            unknown += [f"--{f}" for f in flags if not {f, f.removeprefix("no")} & known]
    return unknown


def sections(text: str) -> dict[str, str]:
    """A page's text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_readme_is_read_in_two_minutes():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 160] == []


@each_page
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text()) == []


@each_page
def test_python_snippets_import_what_there_is(path):
    snippets = [body for language, body in FENCE.findall(path.read_text()) if language == "python"]
    assert [name for snippet in snippets for name in missing_imports(snippet)] == []
    if path == README:
        assert len(snippets) == 2


@each_current
def test_commands_are_there(path):
    assert unknown_commands(path.read_text()) == []


@pytest.mark.parametrize("folder", [*LISTED_WHOLE, "moe_jax"])
def test_architecture_names_files_that_are_there(folder):
    rows = re.findall(r"^\| (`.+?) \|", sections(ARCHITECTURE.read_text())[folder], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    assert {name for name in named if not (ROOT / folder / name).exists()} == set()
    if folder in LISTED_WHOLE:
        files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert files <= named


def test_planted_faults_are_caught(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, `code`\n")
    text = "[a](there.md#a-heading-code) [b](there.md#other) [c](gone.md) [d](https://e.org/x)"
    assert broken_links(tmp_path / "page.md", text) == ["there.md#other", "gone.md"]
    assert missing_imports("import jax\nimport jaxx\nfrom moe_jax import none") == [
        "import jaxx",
        "from moe_jax import none",
    ]
    code = "```\nmake comparee\npython -m experiments.gone --nothing_such\n```"
    assert unknown_commands(code) == ["comparee", "experiments.gone", "--nothing_such"]
