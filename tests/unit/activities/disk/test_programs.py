"""What the programs that a host starts find in their environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from activities.disk.programs import child_environment

ACTIVITIES = Path(__file__).parents[4] / "activities"
STARTERS = {"run", "Popen", "call", "check_call", "check_output"}


def test_nothing_of_ours_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATE_MANAGER_SECRET_KEYS", "k1:secret")
    monkeypatch.setenv("PATH", "/opt/bin")
    assert child_environment() == {"PATH": "/opt/bin", "LC_ALL": "C.UTF-8"}


def starts(path: Path) -> Iterator[ast.Call]:
    """Yield the calls that start a program."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="subprocess"), attr=name)):
                if name in STARTERS:
                    yield node


def environment_of(call: ast.Call) -> str:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == "env"), "none")


def test_each_program_gets_one_that_is_made_for_it() -> None:
    found = {
        f"{path.relative_to(ACTIVITIES)}:{call.lineno}": environment_of(call)
        for path in sorted(ACTIVITIES.rglob("*.py"))
        for call in starts(path)
        if path.name != "vm_supervisor.py"  # it has none that it could pass on
    }
    assert len(found) >= 10
    made = ("child_environment()", "{}", "{**child_environment(), **(environment or {})}")
    wrong = {place: env for place, env in found.items() if env not in made}
    assert wrong == {}
