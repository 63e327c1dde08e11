"""What the CLI prints of builds for programs. Its names are those of the API and do not change."""

from __future__ import annotations

from typing import TypedDict

from google.protobuf.timestamp_pb2 import Timestamp

from api.cli.report import seconds_of
from api.client.client import CallError
from api.pb import template_manager_pb2 as pb


class TimelineRowJson(TypedDict):
    """A step of a build. Times are RFC 3339 in UTC; what has not ended has no `seconds`."""

    step: str
    outcome: str
    reused: bool
    host: str
    started: str
    ended: str | None
    seconds: float | None


class ArtifactJson(TypedDict):
    """A file of a template, and the object that has its data."""

    name: str
    size_bytes: int
    sent_bytes: int
    sha256: str
    object: str


class ProgressJson(TypedDict):
    """How far the running step is."""

    what: str
    done: int
    total: int
    unit: str
    attempt: int
    last_failure: str
    per_second: float


class HostSlotsJson(TypedDict):
    """The hosts that answer, and their slots."""

    hosts: int
    slots: int
    free_slots: int
    draining: int
    away: int


class WaitingJson(TypedDict):
    """What a build waits for that no host has taken."""

    why: str
    message: str
    builds_before: int
    hosts: HostSlotsJson | None


class ReasonJson(TypedDict):
    """Why a build did not succeed."""

    message: str
    step: str
    error_type: str
    hint: str
    log_tail: list[str]


class StatusJson(TypedDict):
    """Everything about a build."""

    build_id: str
    template_id: str
    image: str
    state: str
    step: str
    host: str
    image_digest: str
    workflow_id: str
    run_id: str
    bucket: str
    rootfs_size_mb: int
    agent_version: str
    kernel_version: str
    firecracker_version: str
    timeline: list[TimelineRowJson]
    artifacts: list[ArtifactJson]
    progress: ProgressJson | None
    waiting: WaitingJson | None
    reason: ReasonJson | None
    known_until: str | None
    """While Temporal is away: when this was last looked up."""


class SummaryJson(TypedDict):
    """A row of a list."""

    build_id: str
    template_id: str
    state: str
    step: str
    host: str
    image: str
    started: str
    ended: str | None
    workflow_id: str
    run_id: str
    builds_before: int | None
    tenant: str
    names: list[str]
    """The tags that stand for it: `name:tag`."""


class TagJson(TypedDict):
    """What a tag stands for, and since when that was asked for."""

    tag: str
    build_id: str
    asked: str
    previous: list[str]


class NameJson(TypedDict):
    """A template's name with its tags."""

    name: str
    template_id: str
    tenant: str
    tags: list[TagJson]


class LayerJson(TypedDict):
    """A layer of a template's disk."""

    layer_id: str
    stored_bytes: int
    public: bool
    build_ids: list[str]
    has_more: bool
    freed: bool


class InspectJson(TypedDict):
    """What a template takes in the bucket."""

    build_id: str
    template_id: str
    own_bytes: int
    freed_bytes: int
    layers: list[LayerJson]


class LogLineJson(TypedDict):
    """A line of a log, and where the next one is."""

    timestamp: str
    level: str
    message: str
    fields: dict[str, str]
    next_cursor: int
    run_id: str


class CallErrorJson(TypedDict):
    """Why a call failed; `fields` are the bad ones, and what they must be."""

    code: str
    reason: str
    message: str
    hint: str
    fields: dict[str, str]


class ErrorJson(TypedDict):
    """What is printed in place of an answer."""

    error: CallErrorJson


def status_json(status: pb.TemplateBuildStatusResponse) -> StatusJson:
    """Return a status as plain data. Its names are those of the API and do not change."""
    return {
        "build_id": status.build_id,
        "template_id": status.template_id,
        "image": status.image,
        "state": status.state,
        "step": status.step,
        "host": status.host,
        "image_digest": status.image_digest,
        "workflow_id": status.workflow_id,
        "run_id": status.run_id,
        "bucket": status.bucket,
        "rootfs_size_mb": status.metadata.rootfs_size_mb,
        "agent_version": status.metadata.agent_version,
        "kernel_version": status.metadata.kernel_version,
        "firecracker_version": status.metadata.firecracker_version,
        "timeline": [_timeline_json(row) for row in status.timeline],
        "artifacts": [_artifact_json(artifact) for artifact in status.artifacts],
        "progress": _progress_json(status) if status.HasField("progress") else None,
        "waiting": _waiting_json(status.waiting) if status.HasField("waiting") else None,
        "reason": _reason_json(status.reason) if status.HasField("reason") else None,
        "known_until": _iso(status.known_until) if status.HasField("known_until") else None,
    }


def summary_json(build: pb.TemplateBuildSummary) -> SummaryJson:
    """Return a row of a list as plain data."""
    return {
        "build_id": build.build_id,
        "template_id": build.template_id,
        "state": build.state,
        "step": build.step,
        "host": build.host,
        "image": build.image,
        "started": _iso(build.started),
        "ended": _iso(build.ended) if build.HasField("ended") else None,
        "workflow_id": build.workflow_id,
        "run_id": build.run_id,
        "builds_before": build.builds_before if build.HasField("builds_before") else None,
        "tenant": build.tenant,
        "names": [*build.names],
    }


def name_json(name: pb.TemplateName) -> NameJson:
    """Return a template's name as plain data."""
    return {
        "name": name.name,
        "template_id": name.template_id,
        "tenant": name.tenant,
        "tags": [
            {
                "tag": tag.tag,
                "build_id": tag.build_id,
                "asked": _iso(tag.asked),
                "previous": [*tag.previous],
            }
            for tag in name.tags
        ],
    }


def inspect_json(found: pb.TemplateBuildInspectResponse) -> InspectJson:
    """Return what a template takes as plain data."""
    return {
        "build_id": found.build_id,
        "template_id": found.template_id,
        "own_bytes": found.own_bytes,
        "freed_bytes": found.freed_bytes,
        "layers": [
            {
                "layer_id": layer.layer_id,
                "stored_bytes": layer.stored_bytes,
                "public": layer.is_public,
                "build_ids": [*layer.build_ids],
                "has_more": layer.has_more,
                "freed": layer.is_freed,
            }
            for layer in found.layers
        ],
    }


def log_json(line: pb.TemplateBuildLogsResponse) -> LogLineJson:
    """Return a log line as plain data."""
    entry = line.entry
    return {
        "timestamp": _iso(entry.timestamp),
        "level": pb.LogLevel.Name(entry.level).lower(),
        "message": entry.message,
        "fields": dict(entry.fields),
        "next_cursor": line.next_cursor,
        "run_id": line.run_id,
    }


def error_json(error: CallError) -> ErrorJson:
    """Return an error as plain data."""
    return {
        "error": {
            "code": error.code.name,
            "reason": error.reason,
            "message": error.message,
            "hint": error.hint,
            "fields": {violation.field: violation.description for violation in error.violations},
        }
    }


def _timeline_json(row: pb.StepTimeline) -> TimelineRowJson:
    return {
        "step": row.step,
        "outcome": row.outcome,
        "reused": row.reused,
        "host": row.host,
        "started": _iso(row.started),
        "ended": _iso(row.ended) if row.HasField("ended") else None,
        "seconds": seconds_of(row),
    }


def _artifact_json(artifact: pb.Artifact) -> ArtifactJson:
    return {
        "name": artifact.name,
        "size_bytes": artifact.size_bytes,
        "sent_bytes": artifact.sent_bytes,
        "sha256": artifact.sha256,
        "object": artifact.object,
    }


def _progress_json(status: pb.TemplateBuildStatusResponse) -> ProgressJson:
    progress = status.progress
    return {
        "what": progress.what,
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
        "attempt": progress.attempt,
        "last_failure": progress.last_failure,
        "per_second": progress.per_second,
    }


def _waiting_json(waiting: pb.WaitingForHost) -> WaitingJson:
    hosts = waiting.hosts
    return {
        "why": pb.WaitReason.Name(waiting.why),
        "message": waiting.message,
        "builds_before": waiting.builds_before,
        "hosts": {
            "hosts": hosts.hosts,
            "slots": hosts.slots,
            "free_slots": hosts.free_slots,
            "draining": hosts.draining,
            "away": hosts.away,
        }
        if waiting.HasField("hosts")
        else None,
    }


def _reason_json(reason: pb.TemplateBuildStatusReason) -> ReasonJson:
    return {
        "message": reason.message,
        "step": reason.pipeline_step,
        "error_type": reason.error_type,
        "hint": reason.hint,
        "log_tail": list(reason.log_tail),
    }


def _iso(moment: Timestamp) -> str:
    return moment.ToJsonString()
