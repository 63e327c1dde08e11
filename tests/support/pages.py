"""The Markdown pages of the repository as a reader sees them: their tables, links and code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PARSER = MarkdownIt("commonmark").enable("table")
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Table:
    """A table: the heading above it, and the Markdown of its cells."""

    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> list[str]:
        """Return the cells under a head."""
        return [row[self.head.index(name)] for row in self.rows]


def pages() -> list[Path]:
    """Return all pages of ours."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def tables(page: Path) -> list[Table]:
    """Return the tables of a page."""
    found, heading, rows = [], "", list[list[str]]()
    tokens = PARSER.parse(page.read_text())
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            heading = token.content
        elif before.type == "table_open":
            rows = []
        elif before.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            rows[-1].append(token.content)
        if token.type == "table_close":
            head, *body = map(tuple, rows)
            found.append(Table(heading, head, tuple(body)))
    return found


def table_under(page: Path, heading: str) -> Table:
    """Return the one table under a heading."""
    [table] = [table for table in tables(page) if table.heading == heading]
    return table


def code_in(text: str) -> list[str]:
    """Return what stands between backticks."""
    return CODE.findall(text)


def headings(page: Path) -> list[str]:
    """Return the headings of a page."""
    tokens = PARSER.parse(page.read_text())
    return [token.content for before, token in pairwise(tokens) if before.type == "heading_open"]


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and images."""
    for token in _inline(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target:
            yield str(target)


def code(page: Path) -> Iterator[str]:
    """Yield each code span of a page, and each line of its code blocks, whole if it goes on."""
    for token in _inline(page):
        if token.type == "code_inline":
            yield token.content
    for token in PARSER.parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            yield from token.content.replace("\\\n", " ").splitlines()


def _inline(page: Path) -> Iterator[Token]:
    for token in PARSER.parse(page.read_text()):
        yield from token.children or ()
