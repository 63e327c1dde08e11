"""A build as the API tells it, wherever that is known from: the running workflow, Temporal's
description of it, the archive of a closed build, or a template's metadata."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.client import WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.converter import DataConverter
from temporalio.exceptions import FailureError

from activities.contract.names import DEFAULT_TENANT, Step, build_workflow_id
from activities.contract.requests import TemplateConfig
from activities.contract.results import BuildCheckpoints, UploadedArtifact
from activities.contract.search_attributes import BUILD_STEP, KVM_HOST, TEMPLATE_ID
from activities.contract.status import BuildFailure, BuildState, BuildStatus, Progress, StepRecord
from activities.contract.units import MIB
from api.server.tenancy import tenant_of

if TYPE_CHECKING:
    from activities.store.metadata import TemplateMetadata

HOLDS = {"hold_host", "hold_host_if_free"}
SEND_LAYERS = "send_layers"
"""It runs beside the steps: what the build does is what they do, while one is at work."""
# What an activity does, in words, until it tells more by a heartbeat.
DOING = {
    "enter_line": "entering its tenant's line",
    "find_host": "looking for a host that can run it",
    "release_host": "giving the host back",
    "discard_checkpoints": "removing checkpoints",
    "pull_image": "pulling the image",
    "build_image": "running the steps on top of the image",
    "run_steps": "running the steps in VMs",
    SEND_LAYERS: "sending layers",
    "import_template": "fetching the template to start from",
    "build_rootfs": "building the root file system",
    "clean_up_rootfs": "removing what is left of the root file system",
    "set_up_network": "making the VM's network",
    "tear_down_network": "removing the VM's network",
    "find_snapshot": "looking for a snapshot of the same inputs",
    "start_vm": "starting the VM",
    "wait_until_ready": "waiting for the guest",
    "snapshot_vm": "taking the snapshot",
    "verify_snapshot": "resuming the snapshot",
    "kill_vm": "removing the VM",
    "upload_artifact": "uploading",
    "upload_artifacts": "uploading",
    "publish_template": "publishing the template",
    "discard_upload": "removing what was uploaded",
    "move_tags": "moving the tags",
    "archive_log": "archiving the build log",
}
WAITING_FOR_HOST = "waiting for a KVM host with a free slot"

CLOSED_STATES = {
    WorkflowExecutionStatus.COMPLETED: BuildState.COMPLETED,
    WorkflowExecutionStatus.CANCELED: BuildState.CANCELLED,
    WorkflowExecutionStatus.FAILED: BuildState.FAILED,
    WorkflowExecutionStatus.TERMINATED: BuildState.FAILED,
    WorkflowExecutionStatus.TIMED_OUT: BuildState.FAILED,
}


@dataclass(frozen=True)
class RunningActivity:
    """The activity that a build waits for, as Temporal describes it."""

    progress: Progress
    attempt: int
    last_failure: str


@dataclass(frozen=True)
class BuildView:
    """Everything that the API can tell of a build. What is not known is empty."""

    build_id: str
    template_id: str
    state: BuildState
    step: str = ""
    host: str = ""
    config: TemplateConfig | None = None
    lacks_login: bool = False
    """Whether the build had a registry login that the config does not have any more."""
    done: BuildCheckpoints | None = None
    timeline: tuple[StepRecord, ...] = ()
    failure: BuildFailure | None = None
    image_digest: str = ""
    artifacts: dict[str, UploadedArtifact] = field(default_factory=dict)
    bucket: str = ""
    rootfs_size_mb: int = 0
    agent_version: str = ""
    run_id: str = ""
    tenant: str = DEFAULT_TENANT
    started: datetime | None = None
    activity: RunningActivity | None = None
    waits_for_host: bool = False
    """Whether no host has taken it, or no worker has even begun it."""
    waits_for_turn: bool = False
    """Whether it is its tenant's limit that it waits for."""
    is_answered: bool = False
    """Whether the workflow itself has answered, which takes a worker that can run it."""

    @property
    def workflow_id(self) -> str:
        """The id of the workflow that builds it."""
        return build_workflow_id(self.build_id)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in (BuildState.BUILDING, BuildState.CANCELLING)


def view_of_status(status: BuildStatus) -> BuildView:
    """Return the view of what a workflow, or the archive of a closed one, tells of itself."""
    done, published = status.done, status.published
    rootfs = done.rootfs
    return BuildView(
        build_id=status.config.build_id,
        template_id=status.config.template_id,
        state=status.state,
        step=status.step,
        host=status.host or "",
        config=status.config,
        lacks_login=status.is_login_left_out,
        done=done,
        timeline=status.timeline,
        failure=status.failure,
        image_digest=done.image.digest if done.image else "",
        artifacts=published.artifacts if published else done.uploads,
        bucket=published.bucket if published else "",
        rootfs_size_mb=rootfs.size_bytes // MIB if rootfs else 0,
        agent_version=rootfs.facts.agent_version if rootfs else "",
        tenant=status.config.tenant,
        waits_for_turn=status.waits_for_turn,
    )


def view_of_metadata(metadata: TemplateMetadata, bucket: str) -> BuildView:
    """Return the view of a template whose build nobody remembers."""
    return BuildView(
        build_id=metadata.build_id,
        template_id=metadata.template_id,
        state=BuildState.COMPLETED,
        step=Step.RELEASE,
        config=metadata.config,
        timeline=metadata.timeline,
        image_digest=metadata.image.digest,
        artifacts=metadata.artifacts,
        bucket=bucket,
        rootfs_size_mb=metadata.rootfs_size_mb,
        agent_version=metadata.agent_version,
        tenant=metadata.config.tenant,
    )


def view_of_description(build_id: str, described: WorkflowExecutionDescription) -> BuildView:
    """Return the little that Temporal knows without asking the workflow."""
    attributes = described.typed_search_attributes
    return BuildView(
        build_id=build_id,
        template_id=attributes.get(TEMPLATE_ID) or "",
        state=state_of_description(described),
        step=attributes.get(BUILD_STEP) or "",
        host=attributes.get(KVM_HOST) or "",
    )


async def with_description(
    view: BuildView, described: WorkflowExecutionDescription, converter: DataConverter
) -> BuildView:
    """Add to a view what only Temporal knows: the run, how it ended, the pending activity."""
    state = state_of_description(described)
    if state is BuildState.BUILDING:  # the workflow itself knows better what it is doing
        state = view.state
    return replace(
        view,
        state=state,
        run_id=described.run_id,
        tenant=await tenant_of(described),
        started=described.start_time,
        failure=view.failure or _failure_of_end(described),
        activity=await _running_activity(described, converter),
        waits_for_host=state is BuildState.BUILDING and _waits_for_host(view, described),
    )


def state_of_description(described: WorkflowExecutionDescription) -> BuildState:
    """Return the state as Temporal sees it: a build that is being cancelled is `cancelling`."""
    if described.status in CLOSED_STATES:
        return CLOSED_STATES[described.status]
    extended = described.raw_description.workflow_extended_info
    return BuildState.CANCELLING if extended.cancel_requested else BuildState.BUILDING


def _failure_of_end(described: WorkflowExecutionDescription) -> BuildFailure | None:
    if described.status not in (
        WorkflowExecutionStatus.TERMINATED,
        WorkflowExecutionStatus.TIMED_OUT,
    ):
        return None
    return BuildFailure(
        error_type="BuildTerminatedError",
        message=f"the workflow was ended from outside ({described.status.name.lower()})",
        hint="Retry the build; the host's sweep removes what it left.",
    )


async def _running_activity(
    described: WorkflowExecutionDescription, converter: DataConverter
) -> RunningActivity | None:
    pending = described.raw_description.pending_activities
    steps = [info for info in pending if info.activity_type.name not in HOLDS]
    if not steps:
        waits = any(map(_is_not_taken, pending))
        return RunningActivity(Progress(what=WAITING_FOR_HOST), 1, "") if waits else None
    latest = max(steps, key=_is_told)
    last_failure = ""
    if latest.HasField("last_failure"):
        failure = await converter.decode_failure(latest.last_failure)
        last_failure = failure.message if isinstance(failure, FailureError) else str(failure)
    return RunningActivity(await _progress(latest, converter), latest.attempt, last_failure)


def _is_told(info: PendingActivityInfo) -> tuple[bool, int]:
    """What is greatest of the activity that tells what a build does."""
    return info.activity_type.name != SEND_LAYERS, info.scheduled_time.ToNanoseconds()


def _waits_for_host(view: BuildView, described: WorkflowExecutionDescription) -> bool:
    pending = described.raw_description.pending_activities
    if view.waits_for_turn:
        return True
    if not pending:  # no worker has run the workflow's first task
        return not view.is_answered and not view.step
    return all(info.activity_type.name in HOLDS and _is_not_taken(info) for info in pending)


def _is_not_taken(hold: PendingActivityInfo) -> bool:
    return hold.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED


async def _progress(info: PendingActivityInfo, converter: DataConverter) -> Progress:
    fallback = Progress(what=DOING.get(info.activity_type.name, info.activity_type.name))
    if not info.heartbeat_details.payloads:
        return fallback
    try:
        [detail] = await converter.decode(info.heartbeat_details.payloads[:1], [Progress])
    except (ValueError, RuntimeError):  # a heartbeat that says something else
        return fallback
    return detail if isinstance(detail, Progress) else fallback
