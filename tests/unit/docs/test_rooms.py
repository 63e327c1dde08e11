"""docs/architecture.md has each room, as its docstring tells it, and each step."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from activities.contract import interface
from activities.contract.names import Step
from tests.support.pages import DOCS, ROOT, code_in, table_under

HOUSES = ("activities", "api", "temporal-dev")
ROOMS_WITHOUT_A_HOUSE = ("workflows",)
GENERATED = "api/pb"


def rooms() -> list[Path]:
    """Return the folders of all rooms."""
    below = [path.parent for house in HOUSES for path in (ROOT / house).glob("*/__init__.py")]
    return [*below, *(ROOT / name for name in ROOMS_WITHOUT_A_HOUSE)]


def first_line(room: Path) -> str:
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    return (docstring or "").splitlines()[0] if docstring else ""


def test_each_room_is_told_as_it_tells_itself() -> None:
    table = table_under(DOCS / "architecture.md", "Rooms")
    told = dict(
        zip(map(name_in, table.column("room")), table.column("what lives there"), strict=True)
    )
    real = {str(room.relative_to(ROOT)): first_line(room) for room in rooms()}
    assert told == real | {GENERATED: told[GENERATED]}  # the stubs say nothing of themselves


def name_in(cell: str) -> str:
    return code_in(cell)[0].rstrip("/")


def test_each_step_is_told_in_order_with_activities_that_there_are() -> None:
    table = table_under(DOCS / "architecture.md", "The life of a build")
    assert [name_in(cell) for cell in table.column("step")] == list(Step)
    told = [
        name for head in ("activities", "undo") for name in code_in("".join(table.column(head)))
    ]
    contracts = filter(inspect.isabstract, vars(interface).values())
    assert set(told) <= {name for one in contracts for name in one.__abstractmethods__}
