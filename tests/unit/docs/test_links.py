"""What the pages point to is there: links, headings, files, modules, commands, make targets."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from api.cli.main import app
from tests.support.pages import ROOT, code, headings, links, pages

PATH = re.compile(
    r"(?<![\w./<>-])((?:activities|api|workflows|tests|temporal-dev|proto|docs|\.ci)/[\w./-]*\w/?)"
)
MODULE = re.compile(r"(?<![\w./])((?:activities|api|workflows|tests)(?:\.\w+)+)")
COMMAND = re.compile(r"^(?:\$ )?template-manager ([a-z][\w-]*)(.*)$")
MAKE = re.compile(r"^(?:\$ )?make((?: [a-z0-9-]+)+)")
# It tells of the past, too, and is not rewritten when what it names has gone.
CHANGELOG = ROOT / "CHANGELOG.md"


def each(found: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", found, ids=lambda page: str(page.relative_to(ROOT)))


EVERY_PAGE = each(pages())
EVERY_PAGE_OF_TODAY = each([page for page in pages() if page != CHANGELOG])


def anchor(heading: str) -> str:
    """Return the fragment by which a heading is linked to."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment:
            assert fragment in map(anchor, headings(target)), link


def test_each_decision_has_a_number_of_its_own() -> None:
    numbers = [path.name.split("-")[0] for path in (ROOT / "docs" / "decisions").glob("*.md")]
    assert [number for number in sorted(set(numbers)) if numbers.count(number) > 1] == []


@EVERY_PAGE_OF_TODAY
def test_named_paths_exist(page: Path) -> None:
    named = {path for text in code(page) for path in PATH.findall(text)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@EVERY_PAGE_OF_TODAY
def test_named_modules_have_what_is_named(page: Path) -> None:
    named = {name for text in code(page) for name in MODULE.findall(text)}
    assert [name for name in sorted(named) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """Whether a module, or what it defines at its top, is there."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, last = path.parent.with_suffix(".py"), path.name
    return module.is_file() and last in defined(module)


def defined(module: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@EVERY_PAGE_OF_TODAY
def test_named_commands_and_their_options_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    for text in code(page):
        found = COMMAND.match(text)
        if not found:
            continue
        command = root.commands.get(found[1])  # type: ignore[attr-defined] # it is a group
        assert command is not None, text
        known = {
            name for part in [command, *below(command)] for p in part.params for name in p.opts
        }
        own, _, _ = found[2].partition(" -- ")  # what follows is for an image builder
        words = shlex.split(own, comments=True)
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known | {"--help"}, text


def below(command: object) -> list[object]:
    return list(getattr(command, "commands", {}).values())


@EVERY_PAGE_OF_TODAY
def test_named_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in code(page) for words in MAKE.findall(text) for name in words.split()}
    assert named <= targets
