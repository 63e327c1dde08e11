"""docs/trust.md names code and tests that are there, for every boundary."""

from __future__ import annotations

import ast

import pytest

from tests.support.pages import DOCS, ROOT, Table, code_in, tables

PAGE = DOCS / "trust.md"
BOUNDARIES = [table for table in tables(PAGE) if table.head[0] == "boundary"]
NAMED = [
    name for table in BOUNDARIES for cell in table.column("attacked by") for name in code_in(cell)
]


def functions_of(path: str) -> set[str]:
    """Return the names of a module's tests."""
    tree = ast.parse((ROOT / path).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions)}


def test_all_attacks_are_found() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_is_there(name: str) -> None:
    path, _, test = name.partition("::")
    assert test in functions_of(path)


@pytest.mark.parametrize("table", BOUNDARIES, ids=lambda table: table.rows[0][0])
def test_each_boundary_has_a_check_and_an_attack(table: Table) -> None:
    assert all(all(cell.strip() for cell in row) for row in table.rows)
    assert all(code_in(cell) for cell in table.column("attacked by"))
