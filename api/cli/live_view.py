"""Following a build: on a terminal a view that lives, elsewhere plain lines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from activities.contract.names import Step
from api.cli.console import WIDE
from api.cli.report import amount, duration, log_line, rate_parts, seconds_of, waiting_text
from api.cli.told_once import LogOnce
from api.client.client import CallError, TemplateClient
from api.pb import template_manager_pb2 as pb

STATUS_SECONDS = 1.0
PLAIN_STATUS_SECONDS = 5.0
REFRESH_PER_SECOND = 8
BAR_WIDTH = 24
ICONS = {
    "done": Text("✓", style="green"),
    "failed": Text("✗", style="red"),
    "cancelled": Text("✗", style="yellow"),
    "rewound": Text("↺", style="yellow"),
}


class View:
    """Shows a build that goes on, as one line of text per log line. A context manager."""

    status_seconds = PLAIN_STATUS_SECONDS
    """How often `status` is to be called."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._once = LogOnce(has_end=True)
        self._waits = ""

    def __enter__(self) -> View:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to take away."""
        return

    def line(self, line: pb.TemplateBuildLogsResponse) -> None:
        """Print a log line as it is: not wrapped, whatever the width."""
        self._print(self._once.take(line.entry))

    def status(self, status: pb.TemplateBuildStatusResponse) -> None:
        """Tell what no line of the log does: what the build waits for, when that has changed."""
        waits = waiting_text(status.waiting) if status.HasField("waiting") else ""
        if waits and waits != self._waits:
            self._console.print(Text(f"waiting for a host: {waits}", style="dim"), soft_wrap=True)
        self._waits = waits

    def end(self, status: pb.TemplateBuildStatusResponse) -> Callable[[str], bool]:
        """Print the lines that the end of the build does not tell.

        Returns whether a line has been shown.
        """
        self._print(self._once.rest(status))
        return self._once.is_shown

    def _print(self, entries: Sequence[pb.TemplateBuildLogEntry]) -> None:
        for entry in entries:
            self._console.print(log_line(entry), soft_wrap=True)


class LiveView(View):
    """One line per step below, with what runs now; the log goes by above it."""

    status_seconds = STATUS_SECONDS

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._display = StepsDisplay()
        self._live = Live(
            self._display, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True
        )

    def __enter__(self) -> View:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the display away; the log stays."""
        self._live.__exit__(kind, error, trace)

    def status(self, status: pb.TemplateBuildStatusResponse) -> None:
        """Bring the display up to date."""
        self._display.update(status)


class StepsDisplay:
    """The steps of a build: what is done, what runs and how fast, what is to come."""

    def __init__(self) -> None:
        self._status = pb.TemplateBuildStatusResponse()
        self._spinner = Spinner("dots")
        self._plain_spinner = Spinner("line")
        self._rate = _Rate()

    def update(self, status: pb.TemplateBuildStatusResponse) -> None:
        """Show this status from now on."""
        self._status = status
        self._rate.update(status.progress)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
        latest = {row.step: row for row in self._status.timeline}
        wide = options.max_width >= WIDE
        for step in Step:
            self._add_row(table, step, latest.get(step), options, wide=wide)
        yield table
        if not wide:
            yield self._progress_line()
        if self._status.HasField("waiting"):
            yield Text(waiting_text(self._status.waiting), style="dim")

    def _add_row(
        self,
        table: Table,
        step: str,
        row: pb.StepTimeline | None,
        options: ConsoleOptions,
        *,
        wide: bool,
    ) -> None:
        if row is None:
            table.add_row(Text("·", style="dim"), Text(step, style="dim"))
            return
        seconds = seconds_of(row)
        if seconds is not None:
            note = Text("reused" if row.reused else "", style="dim")
            table.add_row(ICONS.get(row.outcome, ICONS["done"]), step, duration(seconds), note)
            return
        elapsed = max(time.time() - row.started.ToNanoseconds() / 1e9, 0)
        spinner = self._plain_spinner if options.ascii_only else self._spinner
        table.add_row(spinner, step, duration(elapsed), self._progress() if wide else "")

    def _progress(self) -> Table:
        progress = self._status.progress
        line = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = []
        if progress.total:
            cells.append(ProgressBar(progress.total, progress.done, width=BAR_WIDTH))
            cells.append(Text(amount(progress.done, progress.total, progress.unit)))
            cells.append(Text(" ".join(self._rate.parts(progress)), style="dim"))
        if progress.attempt > 1:
            cells.append(Text(f"attempt {progress.attempt}", style="yellow"))
        # Last, so that a long name gives way to the numbers.
        cells.append(Text(progress.what, no_wrap=True, overflow="ellipsis", style="dim"))
        line.add_row(*cells)
        return line

    def _progress_line(self) -> Text:
        progress = self._status.progress
        parts = [progress.what]
        if progress.total:
            parts.append(amount(progress.done, progress.total, progress.unit))
            parts += self._rate.parts(progress)
        if progress.attempt > 1:
            parts.append(f"attempt {progress.attempt}")
        return Text(" · ".join(parts), style="dim")


class _Rate:
    """How fast a step goes, since it began to do what it does now."""

    def __init__(self) -> None:
        self._what = ""
        self._first: tuple[float, int] = (0.0, 0)
        self._last: tuple[float, int] = (0.0, 0)

    def update(self, progress: pb.BuildProgress) -> None:
        now = (time.monotonic(), progress.done)
        if progress.what != self._what or progress.done < self._last[1]:
            self._what, self._first = progress.what, now
        self._last = now

    def parts(self, progress: pb.BuildProgress) -> list[str]:
        """Tell speed and time left: by what the host says, else by what has been seen here."""
        seconds = self._last[0] - self._first[0]
        seen = (self._last[1] - self._first[1]) / seconds if seconds > 0 else 0.0
        return rate_parts(progress, progress.per_second or seen)


def view_for(console: Console) -> View:
    """Return the view that fits where the output goes."""
    return LiveView(console) if console.is_terminal else View(console)


async def follow(
    client: TemplateClient, build_id: str, view: View, *, cursor: int = 0
) -> pb.TemplateBuildStatusResponse:
    """Show a build until it ends. Returns its final status; `view.end` is for the caller.

    Raises CallError.
    """
    polling = asyncio.create_task(_poll(client, build_id, view))
    try:
        async for line in client.logs(build_id, cursor=cursor, follow=True):
            view.line(line)
    finally:
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling
    return await client.status(build_id)


async def _poll(client: TemplateClient, build_id: str, view: View) -> None:
    while True:
        await asyncio.sleep(view.status_seconds)
        with contextlib.suppress(CallError):  # the log's follower tells of a lasting outage
            view.status(await client.status(build_id))
