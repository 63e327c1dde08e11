"""The strings that the product's sources spell, for tests of what only one module may spell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("activities", "workflows", "api")
GENERATED = "api/pb/"


def spelled(pattern: str, *, but_in: str, within: Sequence[str] = PACKAGES) -> list[str]:
    """Return `path:line: string` of each string that has the pattern, outside of one module.

    Texts for people (with a blank in them) and docstrings do not count.
    """
    return [
        f"{path}:{line}: {text}"
        for path in sources(within)
        if path != but_in
        for line, text in _strings(REPOSITORY / path)
        if re.search(pattern, text) and not re.search(r"\s", text)
    ]


def sources(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Return the paths of the modules in packages, without what is generated."""
    found = [path for package in packages for path in (REPOSITORY / package).rglob("*.py")]
    names = sorted(str(path.relative_to(REPOSITORY)) for path in found)
    return [name for name in names if not name.startswith(GENERATED)]


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and value of each string, the parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
