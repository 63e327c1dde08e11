"""What callers are told: the gRPC API's messages in the form of the SDK's models (2.45 to 2.63)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class NamedTemplate:
    """A template's name, and the builds of it that Temporal remembers, latest first."""

    name: pb.TemplateName
    builds: Sequence[pb.TemplateBuildSummary] = ()

    @property
    def place(self) -> str:
        """Where it is in lists: those of an operator have names of several tenants."""
        return f"{self.name.tenant}/{self.name.name}"

    @property
    def tagged(self) -> Mapping[str, str]:
        """The builds that its tags stand for."""
        return {each.tag: each.build_id for each in self.name.tags}

    @property
    def published(self) -> str:
        """The build that a sandbox of it is made of."""
        done = (each.build_id for each in self.builds if each.state == "completed")
        return self.tagged.get("default") or next(done, NO_BUILD)

    @property
    def status(self) -> str:
        """How its last build is; that of one that Temporal has forgotten is known by its tags."""
        if self.builds:
            return STATUSES[self.builds[0].state]
        return READY if self.name.tags else WAITING


def status_answer(build_id: str, template_id: str, status: pb.TemplateBuildStatusResponse) -> Json:
    """Return how a build is. Its ids are those that were asked for where it does not say them."""
    answer: Json = {
        "buildID": status.build_id or build_id,
        "templateID": status.template_id or template_id,
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


def template_answer(template: NamedTemplate) -> Json:
    """Return a template as lists have it. Nobody is told of as its author, nor its use counted."""
    name, builds = template.name, template.builds
    published = (each for each in builds if each.build_id == template.published)
    shown = next(published, builds[0] if builds else pb.TemplateBuildSummary())
    return {
        "templateID": name.template_id,
        "buildID": template.published,
        "cpuCount": shown.vcpu_count,
        "memoryMB": shown.memory_mb,
        "diskSizeMB": shown.disk_size_mb,
        "public": False,
        "aliases": [name.name],
        "names": [name.name],
        "createdAt": name.created.ToJsonString(),
        "updatedAt": _last_change(builds[0]) if builds else name.created.ToJsonString(),
        "createdBy": None,
        "lastSpawnedAt": None,
        "spawnCount": 0,
        "buildCount": len(builds),
        "envdVersion": "",
        "buildStatus": template.status,
    }


def tag_answer(tag: pb.TemplateTag) -> Json:
    """Return a tag and what it stands for."""
    return {"tag": tag.tag, "buildID": tag.build_id, "createdAt": tag.asked.ToJsonString()}


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
