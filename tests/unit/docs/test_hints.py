"""What an error tells to do next can be done: commands, options, settings and fields are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import reference
import typer.main
from google.protobuf.message import Message
from typer.core import TyperCommand, TyperGroup

from activities.contract.requests import BuildOptions
from activities.process.settings import Settings
from activities.process.tenants_file import TenantLimits
from api.cli.main import app
from api.client.credentials import ClientCredentials
from api.pb import template_manager_pb2 as pb
from tests.support.pages import ROOT

COMMAND = re.compile(r"template-manager ([a-z][a-z-]*)((?: --?[a-z][a-z-]*)*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
VARIABLE = re.compile(r"\b(?:TEMPLATE_MANAGER|TEMPORAL)_[A-Z_]*[A-Z]")
FIELD = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
# Of other programs; of the SDK of Temporal.
OTHER_OPTIONS = {"--output", "--platform"}
OTHER_VARIABLES = {"TEMPORAL_ADDRESS"}
RAISED_WITH_A_HINT = {"failed_precondition": 2, "_unavailable": 2}


def hints() -> list[str]:
    """Return all that our code tells to do next: of the types, and where one is raised."""
    of_types = [error.hint for error in reference.error_types() if error.hint]
    rooms = [path for room in reference.ROOMS for path in (ROOT / room).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in sorted(rooms)]
    return sorted({*of_types, *(hint for tree in trees for hint in raised_hints(tree))})


def raised_hints(tree: ast.AST) -> Iterator[str]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        given = [keyword.value for keyword in call.keywords if keyword.arg == "hint"]
        if isinstance(call.func, ast.Name) and call.func.id in RAISED_WITH_A_HINT:
            given += call.args[RAISED_WITH_A_HINT[call.func.id] :]
        for expression in given:
            for part in ast.walk(expression):
                text = reference.text_of(part) if isinstance(part, ast.expr) else ""
                if len(text.split()) > 1:
                    yield text


Command = TyperCommand | TyperGroup


def the_program() -> Command:
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    return program


def command_named(name: str) -> Command:
    program = the_program()
    assert isinstance(program, TyperGroup)
    assert name in program.commands, f"there is no command {name}"
    found = program.commands[name]
    assert isinstance(found, Command)
    return found


def options_of(command: Command) -> set[str]:
    own = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    below = command.commands.values() if isinstance(command, TyperGroup) else ()
    return own.union(*(options_of(one) for one in below if isinstance(one, Command)))


def fields_of(*messages: type[Message]) -> set[str]:
    return {field.name for message in messages for field in message.DESCRIPTOR.fields}


@pytest.mark.parametrize("hint", hints())
def test_what_a_hint_names_is_there(hint: str) -> None:
    for name, options in COMMAND.findall(hint):
        assert set(OPTION.findall(options)) <= options_of(command_named(name)), hint
    everywhere = options_of(the_program()) | OTHER_OPTIONS
    assert set(OPTION.findall(hint)) <= everywhere
    settings = {f"TEMPLATE_MANAGER_{name.upper()}" for name in Settings.model_fields}
    of_clients = {f"TEMPLATE_MANAGER_{name.upper()}" for name in ClientCredentials.model_fields}
    assert set(VARIABLE.findall(hint)) <= settings | of_clients | OTHER_VARIABLES
    fields = fields_of(pb.TemplateCreateRequest, pb.TemplateConfig, pb.GeneralRegistry) | set(
        BuildOptions.model_fields
    )
    assert set(FIELD.findall(hint)) <= fields | set(TenantLimits.model_fields)


def test_hints_are_found() -> None:
    found = hints()
    assert len(found) > 60
    assert any("REGISTRY_LOGIN" not in hint and "--registry-user" in hint for hint in found)
