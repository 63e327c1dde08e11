"""Writes the pages of docs/ that are made from the code: `make docs`.

A test compares each page with what is written here, so a page cannot say something else than the
code does.
"""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from activities.contract import errors
from activities.contract.errors import TemplateManagerError
from api.server.access import NEEDED, Right

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROTO = ROOT / "proto" / "template_manager.proto"
MADE = "<!-- Made from the code by `make docs`: change the code, not this page. -->\n\n"
ERRORS = """\
# Errors

What a build can fail with. The type is in its status (`error_type`), in the Web UI and in the
metrics; the message says what happened, the hint what to do next. *Tried again* says whether the
step is tried again by itself, up to the build's `retry_attempts`. Where nothing is to be done next,
the workflow does it. A time limit that has passed is told as `StepTimeoutError`.
"""
API = """\
# API

`TemplateService` of [proto/template_manager.proto](../proto/template_manager.proto), where the
messages are described. *Right* is what a caller's token needs where the API has a token file; each
right includes those before it: `read`, `build`, `admin`.
"""
RPC = re.compile(
    r"(?P<comment>(?:^ *//[^\n]*\n)*)"
    r"^ *rpc (?P<name>\w+)\((?P<takes>[\w.]+)\) returns \((?P<answers>(?:stream )?[\w.]+)\);",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Rpc:
    """One rpc of the proto file. Its comment is on one line."""

    name: str
    takes: str
    answers: str
    comment: str


def error_types() -> list[type[TemplateManagerError]]:
    """Return all that a build can fail with, in the order in which `errors` has them."""
    return [
        found
        for found in vars(errors).values()
        if inspect.isclass(found)
        and issubclass(found, TemplateManagerError)
        and found is not TemplateManagerError
    ]


def rpcs() -> list[Rpc]:
    """Return the rpcs of the proto file, in its order."""
    return [
        Rpc(found["name"], found["takes"], found["answers"], _one_line(found["comment"], "//"))
        for found in RPC.finditer(PROTO.read_text())
    ]


def errors_page() -> str:
    """Return the page of error types."""
    head = ("type", "what it means", "tried again", "what to do next")
    return f"{MADE}{ERRORS}\n{_table(head, _error_rows())}"


def api_page() -> str:
    """Return the page of rpcs."""
    head = ("rpc", "takes", "answers", "right", "what it does")
    return f"{MADE}{API}\n{_table(head, _rpc_rows())}"


def cli_page() -> str:
    """Return the page of commands, as Typer's own tool writes it."""
    command = [sys.executable, "-m", "typer", "api.cli.main", "utils", "docs"]
    written = subprocess.run(
        [*command, "--name", "template-manager"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return MADE + html.unescape(written.stdout).rstrip("\n") + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "api.md": api_page,
    "cli.md": cli_page,
    "errors.md": errors_page,
}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


def _error_rows() -> Iterator[tuple[str, ...]]:
    for error in error_types():
        meaning = (inspect.getdoc(error) or "").partition("\n\n")[0]
        again = "yes" if error.retryable else "no"
        yield f"`{error.__name__}`", _one_line(meaning), again, error.hint or "–"


def _rpc_rows() -> Iterator[tuple[str, ...]]:
    for rpc in rpcs():
        needed = NEEDED[rpc.name]
        right = "–" if needed is Right.NONE else f"`{needed.name.lower()}`"
        yield f"`{rpc.name}`", f"`{rpc.takes}`", f"`{rpc.answers}`", right, rpc.comment


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(map(_line, (head, ("---",) * len(head), *rows)))


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _one_line(text: str, mark: str = "") -> str:
    return " ".join(line.strip().removeprefix(mark).strip() for line in text.splitlines())


if __name__ == "__main__":
    main()
