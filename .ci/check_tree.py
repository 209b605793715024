"""Checks the tree for what no linter looks at; exits 1 and lists the violations if there are any.

    python .ci/check_tree.py

1. Imports run one way: experiments -> moe_jax -> pallas_kernels. No library reads flags.
2. Version pins are bare name==version, and pyproject.toml names no package index.
3. No committed file is a lock file or names a package registry's host.

It imports only the standard library.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# package -> what none of its modules may import
FORBIDDEN_IMPORTS = {
    "pallas_kernels": ("moe_jax", "experiments", "tests", "absl.flags"),
    "moe_jax": ("experiments", "tests", "absl.flags"),
    "experiments": ("tests",),
}

BARE_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+]*")
LOCK_FILE = re.compile(r"(^|/)([^/]+\.lock|pylock[^/]*\.toml|package-lock\.json)$")
# Dots stand in brackets because this file is checked too.
REGISTRY_HOST = re.compile(
    "|".join(
        (
            r"\bpypi[.][a-z]",
            r"pythonhosted[.]org",
            r"registry[.](npmjs|yarnpkg)",
            r"conda[.]anaconda[.]org",
            r"download[.]pytorch[.]org",
            # whatever the host: a simple-index address, or an index option with an address
            r"https?:[^\s\"']+/simple\b",
            r"(index[-_]url|find[-_]links|registry)[\"']?\s*[=:]\s*[\"']?https?:",
        )
    ),
    re.IGNORECASE,
)


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) for each absolute import in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def import_violations(root: Path) -> list[str]:
    """Imports under root that run against the arrows."""
    return [
        f"{path.relative_to(root)}:{line}: {package} must not import {name}"
        for package, forbidden in FORBIDDEN_IMPORTS.items()
        for path in sorted((root / package).rglob("*.py"))
        for line, name in imported_names(path.read_text(encoding="utf-8"))
        if any(f"{name}.".startswith(f"{banned}.") for banned in forbidden)
    ]


def pin_violations(pyproject: str) -> list[str]:
    """Pins in the text of a pyproject.toml that are not bare, and package indexes that it names."""
    uv = tomllib.loads(pyproject).get("tool", {}).get("uv", {})
    return [
        f"pyproject.toml: constraint-dependencies: {pin!r} is not a bare name==version"
        for pin in uv.get("constraint-dependencies", [])
        if not BARE_PIN.fullmatch(pin)
    ] + [
        f"pyproject.toml: tool.uv.{key} names a package index; leave that to users' settings"
        for key in ("index", "index-url", "extra-index-url", "find-links", "sources")
        if key in uv
    ]


def file_violations(name: str, text: str) -> list[str]:
    """Whether a committed file is a lock file, and the lines of it that name a registry's host."""
    found = [f"{name}: is a lock file"] if LOCK_FILE.search(name) else []
    return found + [
        f"{name}:{number}: names a package registry's host: {match.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := REGISTRY_HOST.search(line))
    ]


def files_in_git(root: Path) -> list[str]:
    """Names of the files that are committed or that git would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listing.split("\0") if (root / name).is_file()]


def tree_violations(root: Path) -> list[str]:
    """Everything above, over the tree at root."""
    found = import_violations(root)
    found += pin_violations((root / "pyproject.toml").read_text(encoding="utf-8"))
    for name in files_in_git(root):
        found += file_violations(name, (root / name).read_text(encoding="utf-8", errors="replace"))
    return found


if __name__ == "__main__":
    violations = tree_violations(ROOT)
    print("\n".join(violations) or "Tree checks passed.")
    sys.exit(bool(violations))
