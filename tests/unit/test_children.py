"""Every program that the product starts gets an environment that was made for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from api.cli.development import environment_of_stack

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("activities", "api", "workflows")
STARTERS = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
    "os": {"system", "popen", "execv", "execve", "execvp", "posix_spawn", "spawnv", "fork"},
}
# What may stand in `env=`; the user's own builder goes by all that the user's shell has.
MADE = {
    "child_environment()",
    "{}",
    "{**child_environment(), **ONE_ARENA, **(environment or {})}",
    "environment_of_stack(os.environ)",
}
OF_THE_USER = {("api/cli/image_builders.py", "_builders_environment()")}
# It has no environment that it could pass on: who starts it gives it none.
WITHOUT_ONE = {"activities/microvm/vm_supervisor.py", "activities/microvm/vm_launcher.py"}


def starts() -> Iterator[tuple[str, int, str]]:
    """Yield path, line and environment of each call that starts a program."""
    for path in sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py")):
        name = str(path.relative_to(REPOSITORY))
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=called)):
                    if called in STARTERS.get(module, ()):
                        yield name, node.lineno, environment_of(node)


def environment_of(call: ast.Call) -> str:
    given = [ast.unparse(word.value) for word in call.keywords if word.arg == "env"]
    return given[0] if given else "ours"


def test_each_child_gets_an_environment_that_is_made_for_it() -> None:
    found = [start for start in starts() if start[0] not in WITHOUT_ONE]
    assert len(found) > 10
    wrong = [
        f"{path}:{line}: {given}"
        for path, line, given in found
        if given not in MADE and (path, given) not in OF_THE_USER
    ]
    assert wrong == []


def test_no_module_starts_programs_by_another_name() -> None:
    hidden = [
        f"{path}: {ast.unparse(node)}"
        for room in ROOMS
        for path in (REPOSITORY / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        if {alias.name for alias in node.names} & STARTERS.get(node.module or "", set())
    ]
    assert hidden == []


def test_the_dev_stack_gets_what_it_goes_by() -> None:
    ours = {
        "PATH": "/bin",
        "https_proxy": "http://proxy",
        "TEMPLATE_MANAGER_DEV_DIR": "/dev-dir",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "SSH_AUTH_SOCK": "/socket",
    }
    assert set(environment_of_stack(ours)) == {"PATH", "https_proxy", "TEMPLATE_MANAGER_DEV_DIR"}
