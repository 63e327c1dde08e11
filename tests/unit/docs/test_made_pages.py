"""The pages that are made from the code are as `make docs` makes them, and leave nothing out."""

from __future__ import annotations

import pytest
import reference

from activities.contract import errors
from tests.support.pages import DOCS, code_in, tables
from tests.support.rpcs import all_rpcs


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_as_the_code_makes_it(name: str) -> None:
    assert (DOCS / name).read_text() == reference.PAGES[name](), "run `make docs`"


def test_each_error_is_told_once() -> None:
    [table] = tables(DOCS / "errors.md")
    names = {name for name in vars(errors) if name.endswith("Error")}
    ours = {name for name in names if getattr(errors, name).__module__ == errors.__name__}
    assert sorted(cell.strip("`") for cell in table.column("type")) == sorted(
        ours - {"TemplateManagerError"}  # the base of all: nothing fails with it
    )
    assert all(table.column("cause"))


def test_each_rpc_is_told_once() -> None:
    table, limits = tables(DOCS / "api.md")
    assert limits.head == ("field", "characters", "entries")
    assert [code_in(cell)[0] for cell in table.column("rpc")] == [
        method.name for method in all_rpcs()
    ]
    assert all(table.column("what it does"))
