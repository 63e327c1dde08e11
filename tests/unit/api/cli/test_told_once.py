"""A failure is told once, whoever tells it."""

from __future__ import annotations

import io

from rich.console import Console

from api.cli.live_view import View
from api.cli.report import failure_text
from api.cli.told_once import LogOnce
from api.pb import template_manager_pb2 as pb

MESSAGE = "the start command ended with exit code 127 (not found)"
HINT = "Run the command in a container of the image."


def entry(
    message: str, level: pb.LogLevel = pb.Info, error_type: str = ""
) -> pb.TemplateBuildLogEntry:
    fields = {"error_type": error_type} if error_type else {}
    return pb.TemplateBuildLogEntry(message=message, level=level, fields=fields)


def failed_log() -> list[pb.TemplateBuildLogEntry]:
    return [
        entry("sh: /bin/serve: not found"),
        entry(MESSAGE, pb.Error, "StartCommandError"),
        entry(f"StartCommandError: {MESSAGE}", pb.Error),
        entry(f"what to do: {HINT}", pb.Error),
        entry("could not kill the VM: it is gone", pb.Warn),
        entry("build is failed"),
    ]


def failed() -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        state="failed",
        reason=pb.TemplateBuildStatusReason(
            message=MESSAGE,
            step="boot_and_snapshot",
            error_type="StartCommandError",
            hint=HINT,
            log_tail=["sh: /bin/serve: not found", "what nobody has seen"],
        ),
    )


def test_who_follows_a_build_to_its_end_reads_each_sentence_once() -> None:
    file = io.StringIO()
    console = Console(file=file, width=1000)
    view = View(console)
    for line in failed_log():
        view.line(pb.TemplateBuildLogsResponse(entry=line))
    console.print(failure_text(failed(), view.end(failed())))
    text = file.getvalue()
    for told in (MESSAGE, HINT, "sh: /bin/serve: not found", "StartCommandError", "it is gone"):
        assert text.count(told) == 1
    assert "│ what nobody has seen" in text


def test_a_log_alone_has_the_failure_once_with_its_type() -> None:
    once = LogOnce()
    shown = [line.message for each in failed_log() for line in once.take(each)]
    assert [*shown, *once.rest()] == [
        "sh: /bin/serve: not found",
        f"StartCommandError: {MESSAGE}",
        f"what to do: {HINT}",
        "could not kill the VM: it is gone",
        "build is failed",
    ]


def test_a_failed_attempt_that_is_tried_again_is_told() -> None:
    once = LogOnce(has_end=True)
    assert once.take(entry("503 from the bucket", pb.Error, "StorageUnavailableError")) == []
    shown = once.take(entry("uploading"))
    assert [line.message for line in shown] == ["503 from the bucket", "uploading"]


def test_what_the_end_does_not_tell_is_not_lost() -> None:
    once = LogOnce(has_end=True)
    for line in failed_log():
        once.take(line)
    completed = pb.TemplateBuildStatusResponse(state="completed")
    rest = [line.message for line in once.rest(completed)]
    assert rest == [f"StartCommandError: {MESSAGE}", f"what to do: {HINT}", "build is failed"]


def test_a_guest_that_writes_like_an_error_is_shown() -> None:
    once = LogOnce(has_end=True)
    assert once.take(entry("ValueError: of the user's program")) != []
