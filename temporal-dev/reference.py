"""Writes the pages of docs/ that are made from the code: `make docs`.

A test compares each page with what is written here, so a page cannot say something else than the
code does.
"""

from __future__ import annotations

import ast
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
from api.server.request_limits import (
    CHARS,
    DEFAULT_CHARS,
    DEFAULT_ENTRIES,
    ENTRIES,
)

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROTOS = tuple(ROOT / "proto" / name for name in ("template_manager.proto", "info_service.proto"))
ROOMS = ("activities", "workflows", "api")
EXAMPLES = 2
MADE = "<!-- Made from the code by `make docs`: change the code, not this page. -->\n\n"
ERRORS = """\
# Errors

What a build can fail with. The type is in its status (`error_type`), in the Web UI and in the
metrics; the message says what happened, the hint what to do next. *For example* has messages as the
code says them, `…` is what they name. *Tried again* says whether the step is tried again by itself,
up to the build's `retry_attempts`. Where nothing is to be done next, the workflow does it.
"""
API = """\
# API

`TemplateService` of [proto/template_manager.proto](../proto/template_manager.proto) and, in the
last two rows, `InfoService` of [proto/info_service.proto](../proto/info_service.proto), where the
messages are described. *Right* is what a caller's token needs where the API has a token file; each
right includes those before it: `read`, `build`, `admin`.
"""
LIMITS = f"""\
## Limits

A request has at most `MAX_REQUEST_KB` ([settings](operations.md#api), 1024 as shipped); gRPC
itself refuses a larger one
(`RESOURCE_EXHAUSTED`). A text in it has at most {DEFAULT_CHARS} characters, and a list
{DEFAULT_ENTRIES}
entries, but for the fields below; of a map the name and the value count together. A field that is
too large is `INVALID_ARGUMENT`, with its size and its limit.
"""
RPC = re.compile(
    r"(?P<comment>(?:^ *//[^\n]*\n)*)"
    r"^ *rpc (?P<name>\w+)\((?P<takes>[\w.]+)\) returns \((?P<answers>(?:stream )?[\w.]+)\);",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Rpc:
    """One rpc of a proto file. Its comment is on one line."""

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
    """Return the rpcs of the proto files, in their order."""
    return [
        Rpc(found["name"], found["takes"], found["answers"], _one_line(found["comment"], "//"))
        for proto in PROTOS
        for found in RPC.finditer(proto.read_text())
    ]


def errors_page() -> str:
    """Return the page of error types."""
    head = ("type", "cause", "for example", "tried again", "what to do next")
    return f"{MADE}{ERRORS}\n{_table(head, _error_rows())}"


def api_page() -> str:
    """Return the page of rpcs."""
    head = ("rpc", "takes", "answers", "right", "what it does")
    limits = _table(("field", "characters", "entries"), _limit_rows())
    return f"{MADE}{API}\n{_table(head, _rpc_rows())}\n{LIMITS}\n{limits}"


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
    said = messages()
    for error in error_types():
        cause = _one_line((inspect.getdoc(error) or "").partition("\n\n")[0])
        examples = "; ".join(f"“{text}”" for text in said.get(error.__name__, ())[:EXAMPLES])
        again = "yes" if error.retryable else "no"
        yield f"`{error.__name__}`", cause, examples or "–", again, error.hint or "–"


def messages() -> dict[str, list[str]]:
    """Return what each type of error is raised with, `…` for what is only known then."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
                text = text_of(call.args[0])
                if re.search(r"\w", text) and text not in found.setdefault(call.func.id, []):
                    found[call.func.id].append(text)
    return found


def text_of(message: ast.expr) -> str:
    """Return a string as the code has it, '' when it has none there."""
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return re.sub("…+", "…", "".join(text_of(part) or "…" for part in parts))
        case _:
            return ""


def _rpc_rows() -> Iterator[tuple[str, ...]]:
    for rpc in rpcs():
        needed = NEEDED[rpc.name]
        right = "–" if needed is Right.NONE else f"`{needed.name.lower()}`"
        yield f"`{rpc.name}`", f"`{rpc.takes}`", f"`{rpc.answers}`", right, rpc.comment


def _limit_rows() -> Iterator[tuple[str, ...]]:
    for name in sorted({*CHARS, *ENTRIES}):
        chars, entries = CHARS.get(name), ENTRIES.get(name)
        yield f"`{name}`", str(chars or DEFAULT_CHARS), str(entries) if entries else "–"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(map(_line, (head, ("---",) * len(head), *rows)))


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _one_line(text: str, mark: str = "") -> str:
    return " ".join(line.strip().removeprefix(mark).strip() for line in text.splitlines())


if __name__ == "__main__":
    main()
