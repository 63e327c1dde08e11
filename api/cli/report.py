"""What the CLI shows of builds to people, as tables and lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from activities.contract.units import KIB, MIB
from api.cli.columns import Column
from api.cli.wording import in_options, option_of
from api.client.client import CallError
from api.pb import template_manager_pb2 as pb

LEVEL_STYLES = {pb.Debug: "dim", pb.Info: "", pb.Warn: "yellow", pb.Error: "bold red"}
STATE_STYLES = {"completed": "green", "failed": "red", "cancelled": "yellow"}
OWN_WORDS = ("", "guest", "image")
"""The sources of log lines that this program has written; all others' are a program's output."""
LIST_COLUMNS = (
    Column("build"),
    Column("state"),
    Column("template"),
    Column("age", 1),
    Column("step", 2),
    Column("took", 3),
    Column("host", 4),
    Column("started", 5),
    Column("tenant", 4),
    Column("names", 2),
)
LAYER_COLUMNS = (
    Column("layer"),
    Column("size"),
    Column("whose", 1),
    Column("a delete"),
    Column("other builds", 2),
)
NAME_COLUMNS = (
    Column("name"),
    Column("build"),
    Column("template", 2),
    Column("since", 1),
    Column("tenant", 3),
)


def log_line(entry: pb.TemplateBuildLogEntry) -> Text:
    """Return a log line for people: time, step, message; the level by its colour and name.

    What a program of the tenant's has said stands behind a bar.
    """
    line = Text(clock_time(entry.timestamp) + " ", style="dim")
    line.append(f"{entry.fields.get('pipeline_step', ''):<17} ", style="cyan")
    if entry.level in (pb.Warn, pb.Error):
        line.append(f"{pb.LogLevel.Name(entry.level).upper()} ", style=LEVEL_STYLES[entry.level])
    if entry.fields.get("source", "") not in OWN_WORDS:
        line.append("│ ", style="dim")
    line.append(entry.message, style=LEVEL_STYLES[entry.level])
    return line


def build_table(status: pb.TemplateBuildStatusResponse) -> Table:
    """Return everything about a build in one table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("build", status.build_id)
    if status.template_id:
        table.add_row("template", status.template_id)
    table.add_row("state", Text(status.state, style=STATE_STYLES.get(status.state, "")))
    if status.HasField("known_until"):
        since = date_time(status.known_until)
        table.add_row("as of", Text(f"{since}: Temporal is away", style="yellow"))
    if status.step and status.state != "completed":
        table.add_row("step", status.step)
    if status.host:
        table.add_row("host", status.host)
    if status.HasField("progress"):
        table.add_row("now", progress_text(status.progress))
    if status.HasField("waiting"):
        table.add_row("waits", waiting_text(status.waiting))
    if status.image or status.image_digest:
        table.add_row("image", "\n".join(filter(None, (status.image, status.image_digest))))
    if status.timeline:
        table.add_row("steps", _steps_table(status))
    if status.artifacts:
        table.add_row("artifacts", _artifacts_table(status))
    if status.bucket:
        table.add_row("objects", f"gs://{status.bucket}/{status.build_id}/")
    return table


def list_rows(builds: Sequence[pb.TemplateBuildSummary], now: datetime) -> list[list[str | Text]]:
    """Return builds as rows of `LIST_COLUMNS`."""
    return [
        [
            build.build_id,
            Text(build.state, style=STATE_STYLES.get(build.state, "")),
            build.template_id,
            age(now.timestamp() - build.started.ToSeconds()),
            _step_of(build),
            ""
            if _is_running(build)
            else duration(build.ended.ToSeconds() - build.started.ToSeconds()),
            build.host,
            date_time(build.started),
            build.tenant,
            ", ".join(build.names),
        ]
        for build in builds
    ]


def layer_rows(found: pb.TemplateBuildInspectResponse) -> list[list[str]]:
    """Return what a template has as rows of `LAYER_COLUMNS`: layers, then what is its own."""
    layers = [
        [
            layer.layer_id,
            size_text(layer.stored_bytes),
            "everybody's" if layer.is_public else "the tenant's",
            "frees it" if layer.is_freed else "leaves it",
            " ".join([*layer.build_ids, *(["…"] if layer.has_more else [])]),
        ]
        for layer in found.layers
    ]
    return [*layers, [found.build_id, size_text(found.own_bytes), "its own", "frees it", ""]]


def name_rows(names: Sequence[pb.TemplateName]) -> list[list[str]]:
    """Return tags of names as rows of `NAME_COLUMNS`; a name without any has a row, too."""
    return [
        [
            f"{name.name}:{tag.tag}",
            tag.build_id,
            name.template_id,
            date_time(tag.asked),
            name.tenant,
        ]
        for name in names
        for tag in name.tags
    ] + [[name.name, "", name.template_id, "", name.tenant] for name in names if not name.tags]


def _step_of(build: pb.TemplateBuildSummary) -> str:
    if build.HasField("builds_before"):
        return f"waits for a host, {build.builds_before} before it"
    return build.step if _is_running(build) or build.state == "failed" else ""


def _took(build: pb.TemplateBuildSummary) -> str:
    if _is_running(build):
        return ""
    return duration(build.ended.ToSeconds() - build.started.ToSeconds())


def _is_running(build: pb.TemplateBuildSummary) -> bool:
    return build.state in ("building", "cancelling")


def failure_text(
    status: pb.TemplateBuildStatusResponse, is_shown: Callable[[str], bool] = lambda line: False
) -> RenderableType:
    """Return why a build did not succeed, its last lines, and what to do next.

    Lines that `is_shown` says have been seen are left out.
    """
    reason = status.reason
    where = f" in {reason.pipeline_step}" if reason.pipeline_step else ""
    parts = [Text(f"build {status.state}{where}", style="bold red")]
    if status.state != "cancelled":  # that says it all
        parts[0].append(f": {reason.message}")
        parts[0].append(f" ({reason.error_type})" if reason.error_type else "", "not bold red")
    parts += [Text(f"  │ {line}", style="dim") for line in reason.log_tail if not is_shown(line)]
    if reason.hint:
        parts.append(Text(f"→ {in_options(reason.hint)}"))
    return Group(*parts)


def error_text(error: CallError) -> RenderableType:
    """Return an error with its bad fields by the names of the command line, and what to do."""
    if not error.violations:
        parts = [Text(f"error: {in_options(error.message)}", style="bold red")]
    else:
        parts = [Text("error: the request is not valid", style="bold red")]
        parts += [
            Text(f"  {option_of(bad.field)}: {in_options(bad.description)}")
            for bad in error.violations
        ]
    if error.hint:
        parts.append(Text(f"→ {in_options(error.hint)}"))
    return Group(*parts)


def progress_text(progress: pb.BuildProgress) -> str:
    """Return how far a step is, in one line of plain text."""
    parts = [progress.what]
    if progress.total:
        parts.append(amount(progress.done, progress.total, progress.unit))
        parts += rate_parts(progress, progress.per_second)
    if progress.attempt > 1:
        parts.append(f"attempt {progress.attempt}")
    if progress.last_failure:
        parts.append(f"last failure: {progress.last_failure}")
    return " · ".join(parts)


def rate_parts(progress: pb.BuildProgress, per_second: float) -> list[str]:
    """Return how fast a step goes and how long it will take, as far as that is known."""
    if per_second <= 0 or progress.done >= progress.total:
        return []
    speed = [f"{per_second / MIB:.1f} MiB/s"] if progress.unit == "bytes" else []
    return [*speed, f"{duration((progress.total - progress.done) / per_second)} left"]


def waiting_text(waiting: pb.WaitingForHost) -> str:
    """Return what a build waits for, in one line: its place, the hosts, and the reason."""
    before = waiting.builds_before
    parts = [f"{_count(before, 'build is', 'builds are')} before it"]
    if waiting.HasField("hosts"):
        parts.append(_hosts_text(waiting.hosts))
    return " · ".join([*parts, waiting.message])


def _hosts_text(hosts: pb.HostSlots) -> str:
    told = f"{_count(hosts.hosts, 'host', 'hosts')}, {_count(hosts.slots, 'slot', 'slots')}"
    details = [f"{hosts.free_slots} free"]
    details += [f"{hosts.draining} draining"] if hosts.draining else []
    details += [f"{hosts.away} more away"] if hosts.away else []
    return f"{told}: {', '.join(details)}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def clock_time(moment: Timestamp) -> str:
    """Return the time of day here, with the zone: 14:03:07+01:00, or 13:03:07Z."""
    return date_time(moment).partition("T")[2]


def date_time(moment: Timestamp) -> str:
    """Return date and time in this machine's zone, which is marked, as ISO 8601 writes them."""
    here = moment.ToDatetime(UTC).astimezone()
    return here.isoformat(timespec="seconds").replace("+00:00", "Z")


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit: 40 s, 5 min, 3 h, 12 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def amount(done: int, total: int, unit: str) -> str:
    """Return an amount with its unit: bytes in that of their total."""
    if unit == "bytes":
        size, name = byte_unit(total)
        return f"{done / size:.1f}/{total / size:.1f} {name}"
    return f"{done}/{total} {unit}".strip()


def byte_unit(size_bytes: int) -> tuple[int, str]:
    """Return the unit in which people read a size, in bytes, and its name."""
    return (MIB, "MiB") if size_bytes >= MIB // 10 else (KIB, "KiB")


def size_text(size_bytes: int) -> str:
    """Return a size as people read it."""
    unit, name = byte_unit(size_bytes)
    return f"{size_bytes / unit:.1f} {name}"


def duration(seconds: float) -> str:
    """Return a duration as people read it: 4.2 s, 3 min 05 s, 2 h 01 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def workflow_address(web_ui: str, status: pb.TemplateBuildStatusResponse) -> str:
    """Return where Temporal's Web UI shows the build."""
    namespace = os.environ.get("TEMPORAL_NAMESPACE", "default")
    return f"{web_ui}/namespaces/{namespace}/workflows/{status.workflow_id}/{status.run_id}"


def seconds_of(row: pb.StepTimeline) -> float | None:
    """Return how long a step took; None while it runs."""
    if not row.HasField("ended"):
        return None
    return (row.ended.ToNanoseconds() - row.started.ToNanoseconds()) / 1e9


def _steps_table(status: pb.TemplateBuildStatusResponse) -> Table:
    table = _table_of_whole_values()
    for row in status.timeline:
        seconds = seconds_of(row)
        taken = "" if seconds is None else duration(seconds)
        outcome = "reused" if row.reused else "" if row.outcome == "done" else row.outcome
        table.add_row(row.step, taken, Text(outcome, style="dim"))
    return table


def _table_of_whole_values() -> Table:
    """Return a table of three columns that breaks what does not fit, and cuts nothing off."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    return table


def _artifacts_table(status: pb.TemplateBuildStatusResponse) -> Table:
    table = _table_of_whole_values()
    for artifact in status.artifacts:
        unit, name = byte_unit(artifact.size_bytes)
        sent = f"{artifact.sent_bytes / unit:.1f} {name} sent"
        table.add_row(artifact.name, sent, f"of {size_text(artifact.size_bytes)}")
    return table
