"""docs/operations.md has every setting with its default, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from activities.contract.requests import BuildOptions
from activities.process.settings import Settings
from api.client.credentials import ClientCredentials
from tests.support.pages import DOCS, ROOT, Table, code, code_in, pages, tables

OPERATIONS = DOCS / "operations.md"
OF_THE_PROCESSES = ("Every process", "API", "KVM host")
OF_CLIENTS = ("Clients",)
OF_A_BUILD = ("Limits of a build",)
HEAD = ("name", "default", "meaning")
NOTHING = "–"
PREFIX = "TEMPLATE_MANAGER_"
VARIABLE = re.compile(rf"{PREFIX}[A-Z_]*[A-Z]")
# What is read besides settings: by the CLI alone, by the dev stack, by the shell's completion.
OTHER_VARIABLES = {"REGISTRY_PASSWORD", "DEV_DIR", "QEMU_ACCEL", "COMPLETE"}


def documented(headings: tuple[str, ...]) -> dict[str, str]:
    """Return name and default of each row under these headings."""
    found: list[Table] = [table for table in tables(OPERATIONS) if table.heading in headings]
    assert [table.heading for table in found] == list(headings)
    assert all(table.head == HEAD for table in found)
    rows = [row for table in found for row in table.rows]
    assert len({row[0] for row in rows}) == len(rows)
    return {code_in(name)[0]: default for name, default, _ in rows}


def as_documented(field: FieldInfo) -> str:
    """Return a default as the tables write it."""
    if field.default_factory is not None:
        return "the machine's name"
    default = field.default
    if default is None or default in ("", SecretStr("")):
        return NOTHING
    if isinstance(default, BaseModel):
        return f"`{default.model_dump_json(exclude_defaults=True)}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def real(model: type[BaseModel], *, upper: bool = True) -> dict[str, str]:
    fields = model.model_fields.items()
    return {name.upper() if upper else name: as_documented(field) for name, field in fields}


@pytest.mark.parametrize(
    ("headings", "defaults"),
    [
        (OF_THE_PROCESSES, real(Settings)),
        (OF_CLIENTS, real(ClientCredentials)),
        (OF_A_BUILD, real(BuildOptions, upper=False)),
    ],
    ids=["processes", "clients", "builds"],
)
def test_each_setting_is_told_with_its_default(
    headings: tuple[str, ...], defaults: dict[str, str]
) -> None:
    assert documented(headings) == defaults


def test_each_row_says_what_the_setting_is_for() -> None:
    for headings in (OF_THE_PROCESSES, OF_CLIENTS, OF_A_BUILD):
        for table in tables(OPERATIONS):
            if table.heading in headings:
                assert all(table.column("meaning"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_variables_that_are_read(page: Path) -> None:
    known = {*real(Settings), *real(ClientCredentials), *OTHER_VARIABLES}
    named = {name for text in code(page) for name in VARIABLE.findall(text)}
    assert {name.removeprefix(PREFIX) for name in named} <= known
