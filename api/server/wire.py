"""From our models to protobuf messages.

Texts of a build are made readable once more: an old log, or a host of an old version, may not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from activities.contract.names import Step
from activities.contract.results import UploadedArtifact
from activities.contract.status import BuildFailure, BuildState, LogEntry, LogLevel, StepRecord
from activities.contract.text import one_line, readable
from api.pb import template_manager_pb2 as pb
from api.server.listing import ListedBuild
from api.server.view import BuildView, RunningActivity
from api.server.waiting import HostSlots, Waiting, Why

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.inspection import SharedLayer
    from activities.store.names import TemplateNames

CANCELLED_REASON = "cancelled"

_STATES = {
    BuildState.BUILDING: pb.Building,
    BuildState.CANCELLING: pb.Building,
    BuildState.COMPLETED: pb.Completed,
    BuildState.FAILED: pb.Failed,
    BuildState.CANCELLED: pb.Failed,
}
_LEVELS = {
    LogLevel.DEBUG: pb.Debug,
    LogLevel.INFO: pb.Info,
    LogLevel.WARN: pb.Warn,
    LogLevel.ERROR: pb.Error,
}


_WHYS = {
    Why.NOT_KNOWN: pb.NotKnown,
    Why.NO_WORKER: pb.NoWorker,
    Why.NO_HOSTS: pb.NoHosts,
    Why.ALL_DRAINING: pb.AllDraining,
    Why.NO_ROOM: pb.NoRoom,
    Why.ALL_BUSY: pb.AllBusy,
    Why.SLOT_IS_FREE: pb.SlotIsFree,
    Why.TENANT_LIMIT: pb.TenantLimit,
}


_BASE = (Step.LEASE, Step.PULL, Step.ROOTFS)


def status_message(view: BuildView) -> pb.TemplateBuildStatusResponse:
    """Return the answer to a status request, without log lines."""
    message = pb.TemplateBuildStatusResponse(
        status=_STATES[view.state],
        build_id=view.build_id,
        metadata=_metadata(view),
        state=view.state,
        step=view.step,
        host=view.host,
        timeline=[_timeline_row(record) for record in view.timeline],
        image_digest=view.image_digest,
        artifacts=[_artifact(artifact) for artifact in view.artifacts.values()],
        workflow_id=view.workflow_id,
        run_id=view.run_id,
        bucket=view.bucket,
        template_id=view.template_id,
        image=view.config.source.described if view.config else "",
    )
    if view.activity is not None:
        message.progress.CopyFrom(_progress(view.activity))
    if reason := _reason(view):
        message.reason.CopyFrom(reason)
    return message


def log_message(entry: LogEntry) -> pb.TemplateBuildLogEntry:
    """Return a log line. Among the fields is its step, in E2B's words and in ours."""
    fields = {name: readable(value) for name, value in entry.fields.items()}
    if entry.step:
        fields["step"] = e2b_step(entry.step, entry.step_number)
        fields["pipeline_step"] = str(entry.step)
    return pb.TemplateBuildLogEntry(
        timestamp=timestamp(entry.timestamp),
        message=one_line(entry.message),
        level=level_number(entry.level),
        fields=fields,
    )


def e2b_step(step: Step, number: int | None) -> str:
    """Name where a build is as E2B does: `base`, the number of a step of the request, `finalize`.

    Source: the Python SDK (e2b 2.45 to 2.63) takes the number as that of the line that wrote the
    step, and `base` and `finalize` as the first and the last one.
    """
    if number is not None:
        return str(number)
    return "base" if step in _BASE else "finalize"


def layer_message(layer: SharedLayer) -> pb.Layer:
    """Write what the tenant of a template may know of a layer."""
    return pb.Layer(
        layer_id=layer.layer_id,
        stored_bytes=layer.stored_bytes,
        is_public=layer.is_everybodys,
        build_ids=layer.builds,
        has_more=layer.has_more,
        is_freed=layer.is_freed,
    )


def summary_message(build: ListedBuild, names: Sequence[str]) -> pb.TemplateBuildSummary:
    """Return one row of a list, with the tags that stand for the build."""
    vcpu_count, memory_mb, disk_size_mb = build.size
    message = pb.TemplateBuildSummary(
        vcpu_count=vcpu_count,
        memory_mb=memory_mb,
        disk_size_mb=disk_size_mb,
        build_id=build.build_id,
        template_id=build.template_id,
        state=build.state,
        step=build.step,
        host=build.host,
        image=build.image,
        started=timestamp(build.started),
        workflow_id=build.workflow_id,
        run_id=build.run_id,
        tenant=build.tenant,
        names=names,
    )
    if build.ended is not None:
        message.ended.CopyFrom(timestamp(build.ended))
    if build.builds_before is not None:
        message.builds_before = build.builds_before
    return message


def names_message(tenant: str, names: TemplateNames) -> pb.TemplateName:
    """Return a template's name with its tags."""
    awaited = sorted(names.awaited.items(), key=lambda item: item[1].asked, reverse=True)
    return pb.TemplateName(
        name=names.name,
        template_id=names.template_id,
        tenant=tenant,
        created=timestamp(names.created),
        tags=[
            pb.TemplateTag(
                tag=name, build_id=tag.build_id, asked=timestamp(tag.asked), previous=tag.previous
            )
            for name, tag in sorted(names.tags.items())
        ],
        awaited=[
            pb.AwaitedBuild(
                build_id=build_id,
                tags=build.tags,
                asked=timestamp(build.asked),
                memory_mb=build.memory_mb,
                vcpu_count=build.vcpu_count,
                disk_size_mb=build.disk_size_mb,
            )
            for build_id, build in awaited
        ],
    )


def waiting_message(waiting: Waiting) -> pb.WaitingForHost:
    """Return what a build waits for."""
    message = pb.WaitingForHost(
        why=_WHYS[waiting.why], message=waiting.message, builds_before=waiting.builds_before
    )
    if waiting.hosts is not None:
        message.hosts.CopyFrom(_host_slots(waiting.hosts))
    return message


def level_number(level: LogLevel) -> pb.LogLevel:
    """Return the number of a level; a higher one is more severe."""
    return _LEVELS[level]


def timestamp(moment: datetime) -> Timestamp:
    """Return a moment as protobuf has it."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def _host_slots(hosts: HostSlots) -> pb.HostSlots:
    return pb.HostSlots(
        hosts=hosts.hosts,
        slots=hosts.slots,
        free_slots=hosts.free_slots,
        draining=hosts.draining,
        away=hosts.away,
    )


def _metadata(view: BuildView) -> pb.TemplateBuildMetadata:
    config = view.config
    return pb.TemplateBuildMetadata(
        rootfs_size_mb=view.rootfs_size_mb,
        agent_version=view.agent_version,
        kernel_version=config.kernel_version if config else "",
        firecracker_version=config.firecracker_version if config else "",
    )


def _reason(view: BuildView) -> pb.TemplateBuildStatusReason | None:
    if view.state is BuildState.CANCELLED:
        cancelled = view.failure or BuildFailure(error_type="BuildCancelledError", message="")
        return _failure(cancelled.model_copy(update={"message": CANCELLED_REASON}))
    if view.state is BuildState.FAILED and view.failure is not None:
        return _failure(view.failure)
    return None


def _failure(failure: BuildFailure) -> pb.TemplateBuildStatusReason:
    step = failure.step
    return pb.TemplateBuildStatusReason(
        message=one_line(failure.message),
        step=e2b_step(step, failure.step_number) if step else None,
        pipeline_step=step or "",
        error_type=readable(failure.error_type),
        hint=one_line(failure.hint),
        log_tail=map(readable, failure.log_tail),
    )


def _progress(activity: RunningActivity) -> pb.BuildProgress:
    progress = activity.progress
    return pb.BuildProgress(
        what=readable(progress.what),
        done=max(progress.done, 0),
        total=max(progress.total, 0),
        unit=progress.unit,
        attempt=activity.attempt,
        last_failure=one_line(activity.last_failure),
        per_second=max(progress.per_second, 0.0),
    )


def _timeline_row(record: StepRecord) -> pb.StepTimeline:
    row = pb.StepTimeline(
        step=record.step,
        started=timestamp(record.started),
        reused=record.reused,
        outcome=record.outcome,
        host=record.host or "",
    )
    if record.ended is not None:
        row.ended.CopyFrom(timestamp(record.ended))
    return row


def _artifact(artifact: UploadedArtifact) -> pb.Artifact:
    data = artifact.objects.get("data")
    return pb.Artifact(
        name=artifact.name,
        size_bytes=artifact.size_bytes,
        sent_bytes=artifact.sent_bytes,
        sha256=artifact.sha256,
        object=data.name if data else "",
    )
