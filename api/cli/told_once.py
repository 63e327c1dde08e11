"""Telling a failure once: a log has it up to three times, and the end of a build again."""

from __future__ import annotations

import re

from activities.contract.errors import LOG_TAIL_LINE_CHARS
from api.pb import template_manager_pb2 as pb

# As the workflow writes them when it gives up (workflows/telling.py).
_FAILURE = re.compile(r"[A-Z]\w*: ")
_HINT = "what to do: "
_END = "build is failed"


class LogOnce:
    """Passes a log's lines on, each failure once.

    A step's own line about its failure waits for the next line, which says the same when the build
    fails by it. With `has_end`, all that the end of the build tells is kept for `rest`.
    """

    def __init__(self, *, has_end: bool = False) -> None:
        self._has_end = has_end
        self._of_step: pb.TemplateBuildLogEntry | None = None
        self._kept: list[pb.TemplateBuildLogEntry] = []
        self._shown: set[str] = set()

    def take(self, entry: pb.TemplateBuildLogEntry) -> list[pb.TemplateBuildLogEntry]:
        """Return what is to be shown now that this line has come."""
        waiting, self._of_step = self._of_step, None
        if waiting is not None and entry.message == _failure_line(waiting):
            waiting = None
        shown = [waiting] if waiting is not None else []
        if entry.level == pb.Error and entry.fields.get("error_type"):
            self._of_step = entry
        elif self._has_end and _is_of_end(entry):
            self._kept.append(entry)
        else:
            shown.append(entry)
        self._shown.update(line.message[:LOG_TAIL_LINE_CHARS] for line in shown)
        return shown

    def rest(
        self, status: pb.TemplateBuildStatusResponse | None = None
    ) -> list[pb.TemplateBuildLogEntry]:
        """Return the lines that are still to be shown, without what the final status tells."""
        kept = [*self._kept, *([self._of_step] if self._of_step is not None else [])]
        self._kept, self._of_step = [], None
        told = _told_by(status) if status is not None and status.HasField("reason") else set()
        return [entry for entry in kept if entry.message not in told]

    def is_shown(self, line: str) -> bool:
        """Whether a line of a failure's tail has gone by already."""
        return line in self._shown


def _failure_line(of_step: pb.TemplateBuildLogEntry) -> str:
    return f"{of_step.fields['error_type']}: {of_step.message}"


def _is_of_end(entry: pb.TemplateBuildLogEntry) -> bool:
    if entry.level != pb.Error:
        return entry.message == _END
    return entry.message.startswith(_HINT) or _FAILURE.match(entry.message) is not None


def _told_by(status: pb.TemplateBuildStatusResponse) -> set[str]:
    reason = status.reason
    return {
        _END,
        reason.message,
        f"{reason.error_type}: {reason.message}",
        f"{_HINT}{reason.hint}",
    }
