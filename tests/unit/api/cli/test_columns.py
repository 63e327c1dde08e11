"""Lists: whole lines in a pipe, on a terminal what fits, at any width and in any encoding."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console
from rich.text import Text

from api.cli.columns import Column, Row, print_rows
from api.cli.report import LIST_COLUMNS, list_rows
from api.pb import template_manager_pb2 as pb

BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
TEMPLATE = "web-frontend-of-the-shop"


def builds() -> list[Row]:
    waiting = pb.TemplateBuildSummary(
        build_id=BUILD, template_id=TEMPLATE, state="building", step="lease_host", builds_before=2
    )
    done = pb.TemplateBuildSummary(
        build_id=BUILD, template_id="web", state="completed", step="release_host", host="kvm-1"
    )
    for build in (waiting, done):
        build.started.FromDatetime(datetime(2026, 1, 2, 3, 0, tzinfo=UTC))
    done.ended.FromDatetime(datetime(2026, 1, 2, 3, 1, 5, tzinfo=UTC))
    return [*list_rows([waiting, done], datetime(2026, 1, 2, 3, 4, tzinfo=UTC))]


def printed(width: int, *, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, no_color=True)
    print_rows(console, LIST_COLUMNS, builds())
    lines = file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    return [line.rstrip() for line in lines]


def test_a_pipe_has_a_line_a_build_and_whole_values() -> None:
    lines = printed(40, terminal=False)
    assert [line.split("\t")[:6] for line in lines] == [
        [BUILD, "building", TEMPLATE, "4 min", "waits for a host, 2 before it", ""],
        [BUILD, "completed", "web", "4 min", "", "1 min 05 s"],
    ]


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (160, ["build", "state", "template", "age", "step", "took", "host", "started"]),
        (124, ["build", "state", "template", "age", "step", "took"]),
        (80, ["build", "state", "template", "age"]),
        (79, ["build", "state", "template"]),
    ],
)
def test_a_terminal_has_the_columns_that_fit_in_order_of_importance(
    width: int, headings: list[str]
) -> None:
    lines = printed(width)
    assert lines[0].split() == headings
    assert len(lines) == 3
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", range(20, 161, 5))
def test_nothing_is_cut_at_any_width(width: int) -> None:
    lines = printed(width)
    text = "\n".join(lines)
    assert "…" not in text
    assert text.count(BUILD) == 2
    assert TEMPLATE in "".join(line.strip() for line in lines)


def test_a_narrow_terminal_has_a_paragraph_a_build() -> None:
    assert printed(40)[:4] == [
        BUILD,
        "  state: building",
        "  template: web-frontend-of-the-shop",
        "  age: 4 min",
    ]


def test_a_value_of_several_lines_is_one_line_in_a_pipe() -> None:
    file = io.StringIO()
    print_rows(Console(file=file, width=20), [Column("a"), Column("b")], [("x\ny", Text("[z]"))])
    assert file.getvalue() == "x, y\t[z]\n"
