"""What callers are told: the gRPC API's messages in the form of the SDK's models (2.45 to 2.63)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from api.pb import template_manager_pb2 as pb

BUILDING, WAITING, READY, ERROR = "building", "waiting", "ready", "error"
STATUSES = {
    "building": BUILDING,
    "cancelling": BUILDING,
    "completed": READY,
    "failed": ERROR,
    "cancelled": ERROR,
}
CANCELLED = "the build was cancelled"
NO_BUILD = "00000000-0000-0000-0000-000000000000"

Json = dict[str, object]


@dataclass(frozen=True)
class ListedTemplate:
    """A template with its builds, latest first; there is at least one."""

    template_id: str
    builds: Sequence[pb.TemplateBuildSummary]

    @property
    def latest(self) -> pb.TemplateBuildSummary:
        """The build that was started last."""
        return self.builds[0]

    @property
    def published(self) -> pb.TemplateBuildSummary | None:
        """The last build that has succeeded."""
        return next((each for each in self.builds if each.state == "completed"), None)


def status_answer(build_id: str, template_id: str, status: pb.TemplateBuildStatusResponse) -> Json:
    """Return how a build is."""
    answer: Json = {
        "buildID": build_id,
        "templateID": template_id,
        "status": WAITING if status.HasField("waiting") else STATUSES[status.state],
        "logEntries": log_entries(status),
        "logs": [],
    }
    if reason := _reason(status):
        answer["reason"] = reason
    return answer


def log_entries(status: pb.TemplateBuildStatusResponse) -> list[Json]:
    """Return the log lines of a status."""
    return [_log_entry(entry) for entry in status.log_entries]


def template_answer(template: ListedTemplate) -> Json:
    """Return a template as lists have it. Nobody is told of as its author, nor its use counted."""
    shown = template.published or template.latest
    return {
        "templateID": template.template_id,
        "buildID": template.published.build_id if template.published else NO_BUILD,
        "cpuCount": shown.vcpu_count,
        "memoryMB": shown.memory_mb,
        "diskSizeMB": shown.disk_size_mb,
        "public": False,
        "aliases": [template.template_id],
        "names": [template.template_id],
        "createdAt": template.builds[-1].started.ToJsonString(),
        "updatedAt": _last_change(template.latest),
        "createdBy": None,
        "lastSpawnedAt": None,
        "spawnCount": 0,
        "buildCount": len(template.builds),
        "envdVersion": "",
        "buildStatus": STATUSES[template.latest.state],
    }


def build_answer(build: pb.TemplateBuildSummary) -> Json:
    """Return one build of a template."""
    answer: Json = {
        "buildID": build.build_id,
        "status": STATUSES[build.state],
        "createdAt": build.started.ToJsonString(),
        "updatedAt": _last_change(build),
        "cpuCount": build.vcpu_count,
        "memoryMB": build.memory_mb,
        "diskSizeMB": build.disk_size_mb,
    }
    if build.HasField("ended"):
        answer["finishedAt"] = build.ended.ToJsonString()
    return answer


def _last_change(build: pb.TemplateBuildSummary) -> str:
    return (build.ended if build.HasField("ended") else build.started).ToJsonString()


def _reason(status: pb.TemplateBuildStatusResponse) -> Json | None:
    """Return why a build has failed. The SDK's exception says the message and nothing else."""
    if STATUSES[status.state] is not ERROR:
        return None
    reason = status.reason
    told = reason.message or CANCELLED
    answer: Json = {"message": f"{told}\n→ {reason.hint}" if reason.hint else told}
    if reason.step:
        answer["step"] = reason.step
    return answer | {"logEntries": []}


def _log_entry(entry: pb.TemplateBuildLogEntry) -> Json:
    answer: Json = {
        "timestamp": entry.timestamp.ToJsonString(),
        "message": entry.message,
        "level": pb.LogLevel.Name(entry.level).lower(),
    }
    return answer | ({"step": entry.fields["step"]} if "step" in entry.fields else {})
