"""No text of a build steers the terminal that shows it."""

from __future__ import annotations

import io
import json
import re

import grpc
from hypothesis import given, settings
from rich.text import Text

from activities.contract.status import LogEntry, LogLevel
from activities.process.clock import utc_now
from api.cli.columns import Column, print_rows
from api.cli.console import TextConsole
from api.cli.json_output import log_json, status_json
from api.cli.live_view import LiveView
from api.cli.report import build_table, error_text, failure_text, log_line
from api.client.client import CallError
from api.errors import Violation
from api.pb import template_manager_pb2 as pb
from api.server.wire import log_message, timestamp
from tests.support.hostile_text import hostile_text

# What Rich itself writes: colours, and what moves the cursor for a live view.
OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[AKG]|2K|1A)|\r(?=\x1b\[)")


def written(*things: object, terminal: bool = True) -> str:
    file = io.StringIO()
    console = TextConsole(file=file, width=100, force_terminal=terminal)
    for thing in things:
        console.print(thing, soft_wrap=True)
    return file.getvalue()


def is_harmless(output: str) -> bool:
    rest = OWN.sub("", output)
    return all(c == "\n" or c.isprintable() for c in rest)


def status_of(text: str) -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=text,
        state="failed",
        step=text,
        host=text,
        image=text,
        template_id=text,
        bucket=text,
        progress=pb.BuildProgress(what=text, last_failure=text),
        waiting=pb.WaitingForHost(message=text),
        timeline=[pb.StepTimeline(step=text, host=text, outcome=text)],
        artifacts=[pb.Artifact(name=text, object=text)],
        reason=pb.TemplateBuildStatusReason(
            message=text, step=text, error_type=text, hint=text, log_tail=[text, text]
        ),
    )


@given(hostile_text)
def test_what_a_build_says_reaches_a_terminal_as_text_alone(text: str) -> None:
    status = status_of(text)
    entry = pb.TemplateBuildLogEntry(message=text, fields={"pipeline_step": text}, level=pb.Error)
    error = CallError(grpc.StatusCode.INTERNAL, "", text, text, (Violation(text, text),))
    things = (log_line(entry), failure_text(status), build_table(status), error_text(error))
    for terminal in (True, False):
        assert is_harmless(written(*things, text, Text(text), terminal=terminal))


@given(hostile_text)
@settings(max_examples=10)
def test_a_live_view_shows_text_alone(text: str) -> None:
    file = io.StringIO()
    with LiveView(TextConsole(file=file, width=60, force_terminal=True)) as view:
        view.status(status_of(text))
        entry = pb.TemplateBuildLogEntry(message=text, fields={"pipeline_step": text})
        view.line(pb.TemplateBuildLogsResponse(entry=entry))
    assert is_harmless(file.getvalue())


@given(hostile_text)
def test_a_row_in_a_pipe_is_one_line_with_whole_values(text: str) -> None:
    file = io.StringIO()
    console = TextConsole(file=file, force_terminal=False)
    print_rows(console, [Column("a"), Column("b")], [(text, Text(text))])
    output = file.getvalue()
    assert len(output.splitlines()) == 1
    assert output.count("\t") == 1


@given(hostile_text)
def test_json_is_ascii_and_a_line_of_it_is_one_line(text: str) -> None:
    entry = pb.TemplateBuildLogEntry(message=text, fields={text: text})
    line = json.dumps(log_json(pb.TemplateBuildLogsResponse(entry=entry)))
    assert line.isascii()
    assert line.isprintable()
    whole = json.dumps(status_json(status_of(text)), indent=2)
    assert whole.isascii()
    assert whole.replace("\n", "").isprintable()


@given(hostile_text)
def test_the_api_makes_old_logs_harmless(text: str) -> None:
    old = LogEntry(timestamp=utc_now(), level=LogLevel.INFO, message=text, fields={"a": text})
    message = log_message(old)
    assert message.timestamp == timestamp(old.timestamp)
    for shown in (message.message, message.fields["a"]):
        assert all(c == "\t" or c.isprintable() for c in shown)


def test_markup_and_emoji_are_text() -> None:
    told = "[bold]a[/bold] [link=http://evil.example]b[/link] :warning:"
    assert written(told, terminal=False) == f"{told}\n"


def test_a_status_line_is_text() -> None:
    file = io.StringIO()
    console = TextConsole(file=file, width=100, force_terminal=True)
    with console.status("draining [red]a[/red] [/]"):
        pass
    assert "draining [red]a[/red] [/]" in file.getvalue()
