"""What import-linter does not see: other roots, packages without `__init__`, names of no module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("activities", "api", "workflows")
FILES = sorted(
    path.relative_to(REPOSITORY) for root in ROOTS for path in (REPOSITORY / root).rglob("*.py")
)
# What runs within Temporal's sandbox, or is read there.
REPLAYED = [path for path in FILES if path.parts[0] == "workflows" or "contract" in path.parts]
REPLAYED_MAY_IMPORT = {
    *("__future__", "abc", "asyncio", "collections", "contextlib", "dataclasses", "datetime"),
    *(
        "enum",
        "json",
        "posixpath",
        "re",
        "typing",
        "uuid",
        "pydantic",
        "temporalio",
        "activities",
        "workflows",
    ),
}
NOT_REPLAYED = {"__import__", "compile", "eval", "exec", "input", "open"}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((REPOSITORY / path).read_text()))


def imported(path: Path) -> set[str]:
    """Return the top of each module that is imported, wherever in the file."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_comes_from_elsewhere_in_the_repository(path: Path) -> None:
    known = {*sys.stdlib_module_names, *packages_distributions(), *ROOTS, "_typeshed"}
    assert imported(path) <= known


def test_each_directory_of_code_is_a_package_that_walls_see() -> None:
    without = {
        path.parent for path in FILES if not (REPOSITORY / path.parent / "__init__.py").exists()
    }
    assert not without


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name == "__init__.py" and "pb" not in path.parts],
    ids=str,
)
def test_a_package_holds_its_docstring_alone(path: Path) -> None:
    body = ast.parse((REPOSITORY / path).read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


@pytest.mark.parametrize("path", REPLAYED, ids=str)
def test_what_is_replayed_imports_nothing_that_does_io(path: Path) -> None:
    assert imported(path) <= REPLAYED_MAY_IMPORT
    called = {
        node.func.id
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & NOT_REPLAYED


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "workflows"], ids=str)
def test_activities_are_called_by_their_types_alone(path: Path) -> None:
    called = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)}
    by_name = {name for name in called if "execute_activity" in name or "start_activity" in name}
    assert not by_name or path.name == "calling.py"
