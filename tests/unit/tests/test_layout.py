"""Where tests lie, what they share, and in which half of a run they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from devstack.environment import REPOSITORY

TESTS = REPOSITORY / "tests"
UNIT = TESTS / "unit"
HALVES = {"counts_host", "counts_nothing"}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def marks_of_all_in(path: Path) -> set[str]:
    """Return the names of the marks in a module's `pytestmark`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
    return set()


def test_unit_tests_lie_as_the_code_does() -> None:
    folders = {path.parent.relative_to(UNIT) for path in UNIT.rglob("test_*.py")}
    assert [folder for folder in sorted(folders) if not (REPOSITORY / folder).is_dir()] == []


def test_what_tests_share_is_in_support() -> None:
    wrong = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for name in imports_of(path)
        if name.split(".")[0] == "tests" and not name.startswith("tests.support")
    ]
    assert wrong == []


def test_an_integration_test_says_whether_it_counts_what_the_machine_has() -> None:
    silent = [
        path.name
        for path in sorted((TESTS / "integration").glob("test_*.py"))
        if len(marks_of_all_in(path) & HALVES) != 1
    ]
    assert silent == []
