"""What the CLI shows of builds to people, as tables and lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from activities.contract.units import MIB
from api.client.client import CallError
from api.pb import template_manager_pb2 as pb

LEVEL_STYLES = {pb.Debug: "dim", pb.Info: "", pb.Warn: "yellow", pb.Error: "bold red"}
STATE_STYLES = {"completed": "green", "failed": "red", "cancelled": "yellow"}
# What a bad field is called on the command line.
FLAGS = {
    "template.template_id": "--template-id",
    "template.build_id": "--build-id",
    "template.from_image": "--image",
    "template.memory_mb": "--memory",
    "template.vcpu_count": "--vcpu",
    "template.disk_size_mb": "--disk",
    "template.kernel_version": "--kernel",
    "template.firecracker_version": "--firecracker",
    "template.start_command": "--start-command",
    "template.ready_command": "--ready-command",
    "template.ready_timeout_seconds": "--ready-timeout",
    "template.from_image_registry.general.username": "--registry-user",
    "template.from_image_registry.general.password": "--registry-password-stdin",
    "template.from_image_registry.gcp.service_account_json": "--google-key-file",
    "build_id": "BUILD_ID",
}


def log_line(entry: pb.TemplateBuildLogEntry) -> Text:
    """Return a log line for people: time, step, message; the level by its colour and name."""
    line = Text(entry.timestamp.ToDatetime().strftime("%H:%M:%S "), style="dim")
    line.append(f"{entry.fields.get('step', ''):<17} ", style="cyan")
    if entry.level in (pb.Warn, pb.Error):
        line.append(f"{pb.LogLevel.Name(entry.level).upper()} ", style=LEVEL_STYLES[entry.level])
    line.append(entry.message, style=LEVEL_STYLES[entry.level])
    return line


def build_table(build_id: str, status: pb.TemplateBuildStatusResponse) -> Table:
    """Return everything about a build in one table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("build", build_id)
    if status.template_id:
        table.add_row("template", status.template_id)
    table.add_row("state", Text(status.state, style=STATE_STYLES.get(status.state, "")))
    if status.step and status.state != "completed":
        table.add_row("step", status.step)
    if status.host:
        table.add_row("host", status.host)
    if status.HasField("progress"):
        table.add_row("now", progress_text(status.progress))
    if status.image or status.image_digest:
        table.add_row("image", "\n".join(filter(None, (status.image, status.image_digest))))
    if status.timeline:
        table.add_row("steps", _steps_table(status))
    if status.artifacts:
        table.add_row("artifacts", _artifacts_table(status))
    if status.bucket:
        table.add_row("objects", f"gs://{status.bucket}/{build_id}/")
    return table


def list_table(builds: Sequence[pb.TemplateBuildSummary]) -> Table:
    """Return builds as rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("build", "template", "state", "step", "host", "started", "took"):
        table.add_column(heading, no_wrap=heading == "build")
    for build in builds:
        running = build.state in ("building", "cancelling")
        table.add_row(
            build.build_id,
            build.template_id,
            Text(build.state, style=STATE_STYLES.get(build.state, "")),
            build.step if running or build.state == "failed" else "",
            build.host,
            build.started.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "" if running else duration(build.ended.ToSeconds() - build.started.ToSeconds()),
        )
    return table


def failure_text(status: pb.TemplateBuildStatusResponse) -> RenderableType:
    """Return why a build did not succeed, its last lines, and what to do next."""
    reason = status.reason
    where = f" in {reason.step}" if reason.step else ""
    parts = [Text(f"build {status.state}{where}: {reason.message}", style="bold red")]
    if reason.error_type:
        parts[0].append(f" ({reason.error_type})", style="not bold red")
    parts += [Text(f"  │ {line}", style="dim") for line in reason.log_tail]
    if reason.hint:
        parts.append(Text(f"→ {reason.hint}"))
    return Group(*parts)


def error_text(error: CallError) -> RenderableType:
    """Return an error with its bad fields by the names of the command line, and what to do."""
    if not error.violations:
        parts = [Text(f"error: {error.message}", style="bold red")]
    else:
        parts = [Text("error: the request is not valid", style="bold red")]
        parts += [
            Text(f"  {FLAGS.get(bad.field, bad.field)}: {bad.description}")
            for bad in error.violations
        ]
    if error.hint:
        parts.append(Text(f"→ {error.hint}"))
    return Group(*parts)


def progress_text(progress: pb.BuildProgress) -> str:
    """Return how far a step is, in one line of plain text."""
    parts = [progress.what]
    if progress.total:
        parts.append(amount(progress.done, progress.total, progress.unit))
    if progress.attempt > 1:
        parts.append(f"attempt {progress.attempt}")
    if progress.last_failure:
        parts.append(f"last failure: {progress.last_failure}")
    return escape(" · ".join(parts))


def amount(done: int, total: int, unit: str) -> str:
    """Return an amount with its unit: bytes as MiB."""
    if unit == "bytes":
        return f"{done / MIB:.1f}/{total / MIB:.1f} MiB"
    return f"{done}/{total} {unit}".strip()


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
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in status.timeline:
        seconds = seconds_of(row)
        taken = "" if seconds is None else duration(seconds)
        outcome = "reused" if row.reused else "" if row.outcome == "done" else row.outcome
        table.add_row(row.step, taken, Text(outcome, style="dim"))
    return table


def _artifacts_table(status: pb.TemplateBuildStatusResponse) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for artifact in status.artifacts:
        sent = f"{artifact.sent_bytes / MIB:.1f} MiB sent"
        table.add_row(artifact.name, sent, f"of {artifact.size_bytes / MIB:.1f} MiB")
    return table
