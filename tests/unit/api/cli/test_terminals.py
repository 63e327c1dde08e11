"""Terminals of all kinds: without Unicode, narrow, and none at all."""

from __future__ import annotations

import codecs
import io
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from api.cli.console import print_table
from api.cli.live_view import LiveView, StepsDisplay
from api.cli.report import build_table, failure_text, log_line
from api.cli.streams import READABLE, replace_unprintable
from api.pb import template_manager_pb2 as pb
from tests.support.command_line import on_terminal

ROOT = Path(__file__).parents[4]
BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C"},
    {"PYTHONIOENCODING": "latin-1"},
]


def status(state: str = "failed") -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=BUILD,
        state=state,
        step="upload",
        image="registry.test/web:1",
        image_digest="sha256:" + "a" * 64,
        timeline=[pb.StepTimeline(step="upload", outcome="running")],
        progress=pb.BuildProgress(
            what="uploading memfile", done=1 << 20, total=1 << 22, unit="bytes", per_second=1 << 20
        ),
        reason=pb.TemplateBuildStatusReason(
            message="la commande a échoué",
            step="boot_and_snapshot",
            error_type="StartCommandError",
            hint="Read the last lines …",
            log_tail=["→ größer", "日本"],
        ),
    )


def rendered(thing: RenderableType, width: int, encoding: str) -> str:
    codecs.register_error(READABLE, replace_unprintable)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors=READABLE)
    Console(file=file, width=width, highlight=False).print(thing)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 80])
def test_without_unicode_there_is_something_like_it(width: int) -> None:
    text = rendered(failure_text(status()), width, "ascii")
    assert text.isascii()
    assert "  | > gr\\xf6\\xdfer" in text
    assert "  | \\u65e5\\u672c" in text
    assert "> Read the last lines ~" in text
    assert "\\xe9chou\\xe9" in "".join(text.split())


def test_with_unicode_all_is_as_it_was() -> None:
    assert "│ → größer" in rendered(failure_text(status()), 80, "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int, encoding: str) -> None:
    display = StepsDisplay()
    display.update(status("building"))
    for thing in (build_table(status()), display):
        text = rendered(thing, width, encoding)
        assert max(map(len, text.splitlines())) <= width
        told = "".join(text.split())
        for part in ("uploadingmemfile", "1.0/4.0MiB", "1.0MiB/s", "3.0sleft"):
            assert part in told, text


def test_a_live_view_moves_without_unicode() -> None:
    codecs.register_error(READABLE, replace_unprintable)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors=READABLE)
    with LiveView(Console(file=file, width=40, force_terminal=True)) as view:
        view.status(status("building"))
        view.line(pb.TemplateBuildLogsResponse(entry=pb.TemplateBuildLogEntry(message="größer")))
    file.flush()
    assert b"gr\\xf6\\xdfer" in raw.getvalue()
    assert b"uploading memfile" in raw.getvalue()


def test_a_log_line_is_never_wrapped() -> None:
    entry = pb.TemplateBuildLogEntry(message="word " * 30)
    file = io.StringIO()
    Console(file=file, width=40).print(log_line(entry), soft_wrap=True)
    assert len(file.getvalue().splitlines()) == 1


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_a_command_tells_its_error_in_every_encoding(environment: Mapping[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "api.cli.main", "status", "größe", "--api-address", "127.0.0.1:1"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 3
    assert b"error: the API at 127.0.0.1:1 cannot be reached" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_an_argument_that_is_no_text_in_the_locale_is_told() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "api.cli.main", "status", "größe"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "LANG": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
        },
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 2
    assert b"> Set LC_ALL=C.UTF-8." in ended.stderr


async def test_a_narrow_ascii_terminal_reads_every_word_of_an_error() -> None:
    code, shown = await on_terminal("build", columns=40, env={"PYTHONIOENCODING": "ascii"})
    said = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert code == 2
    assert said.isascii()
    assert max(map(len, said.splitlines())) <= 40
    assert "what to build from? Give one of --image," in " ".join(said.split())
    assert "> See template-manager build --help." in said


def test_a_pipe_gets_no_blanks_at_the_ends_of_lines() -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=10_000, highlight=False), build_table(status()))
    lines = out.getvalue().splitlines()
    assert len(lines) > 5
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("width", [30, 40, 50])
def test_a_narrow_terminal_gets_whole_values(width: int) -> None:
    text = "".join(rendered(build_table(status()), width, "utf-8").split())
    assert "…" not in text
    assert BUILD in text
