"""Builds: finding, starting, stopping and deleting them. All of it is durable in Temporal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import (
    TemplateAlreadyPublishedError,
    TemplateNotFoundError,
    failure_of,
)
from activities.contract.inputs import BuildInput, DeleteTemplateInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, build_workflow_id, delete_workflow_id
from activities.contract.requests import BuildStep
from activities.contract.search_attributes import (
    BUILD_ID,
    BUILD_STATE,
    CONFIG_SHA256_MEMO,
    IMAGE,
    IMAGE_MEMO,
    TEMPLATE_ID,
)
from activities.contract.status import BuildResult, BuildState, BuildStatus
from activities.process.settings import Settings
from api.errors import (
    RETRY_SECONDS,
    ApiError,
    Violation,
    failed_precondition,
    temporal_unavailable,
)
from api.server.access import require_image
from api.server.error_translation import build_not_found
from api.server.template_bucket import TemplateBucket
from api.server.validation import ValidRequest, config_sha256, options_for, require_same_config
from api.server.view import (
    BuildView,
    state_of_description,
    view_of_description,
    view_of_metadata,
    view_of_status,
    with_description,
)
from workflows.build_template import BuildTemplate
from workflows.delete_template import DeleteTemplate

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.metadata import TemplateMetadata

RPC_LIMIT = timedelta(seconds=10)
QUERY_LIMIT = timedelta(seconds=3)
CREATE_ATTEMPTS = 3
MAX_BASES = 100  # templates on templates: more than that go round in a circle

BuildHandle = WorkflowHandle[BuildTemplate, BuildResult]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StartedBuild:
    """The build that answers a create request. `run_id` is empty when Temporal has forgotten it."""

    build_id: str
    workflow_id: str
    run_id: str


class Builds:
    """The builds that Temporal runs or remembers, and the templates that are in the bucket."""

    def __init__(self, client: Client, bucket: TemplateBucket, settings: Settings) -> None:
        self._client = client
        self._bucket = bucket
        self._settings = settings

    # ---- Finding

    async def view(self, build_id: str, template_id: str = "") -> BuildView:
        """Tell everything about a build. Raises ApiError NOT_FOUND; a deleted build is not there.

        `template_id`, if given, must be the build's.
        """
        view = await self._view(build_id)
        if view is None or (template_id and view.template_id not in ("", template_id)):
            raise build_not_found(build_id, template_id)
        return view

    async def _view(self, build_id: str) -> BuildView | None:
        described = await self._describe(build_workflow_id(build_id))
        if described is None:
            return await self._forgotten(build_id)
        if await self._was_deleted(build_id, described):
            return None
        status = await self._query(described)
        view = replace(view_of_status(status), is_answered=True) if status else None
        if view is None and described.status is not WorkflowExecutionStatus.RUNNING:
            view = await self._archived(build_id) or await self._ended(build_id, described)
        view = view or view_of_description(build_id, described)
        return await with_description(view, described, self._client.data_converter)

    async def _describe(self, workflow_id: str) -> WorkflowExecutionDescription | None:
        try:
            handle = self._client.get_workflow_handle(workflow_id)
            return await handle.describe(rpc_timeout=RPC_LIMIT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise

    async def _was_deleted(self, build_id: str, build: WorkflowExecutionDescription) -> bool:
        """Whether a delete has begun after this build, and has not failed."""
        if build.status is WorkflowExecutionStatus.RUNNING:
            return False  # a delete stops it first
        delete = await self._describe(delete_workflow_id(build_id))
        if delete is None or delete.start_time < build.start_time:
            return False
        running_or_done = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.COMPLETED)
        return delete.status in running_or_done

    async def _query(self, described: WorkflowExecutionDescription) -> BuildStatus | None:
        """Ask the workflow itself; None when no worker answers."""
        try:
            return await self._handle(described).query(
                BuildTemplate.status, rpc_timeout=QUERY_LIMIT
            )
        except WorkflowQueryFailedError:
            return None
        except RPCError as error:
            if error.status is RPCStatusCode.UNAVAILABLE:
                raise
            _log.warning("no worker answers a query", workflow_id=described.id, error=str(error))
            return None

    async def _forgotten(self, build_id: str) -> BuildView | None:
        """Find a build that Temporal does not know (any more)."""
        metadata = await self._bucket.metadata(build_id)
        if metadata is not None:
            return view_of_metadata(metadata, self._bucket.name)
        view = await self._archived(build_id)
        # Without its metadata a completed build's template has been deleted.
        return None if view is None or view.state is BuildState.COMPLETED else view

    async def _archived(self, build_id: str) -> BuildView | None:
        archived = await self._bucket.archived_log(build_id)
        return view_of_status(archived[0]) if archived else None

    async def _ended(self, build_id: str, described: WorkflowExecutionDescription) -> BuildView:
        """Tell what the end of the workflow itself tells: its failure, with no worker's help."""
        view = view_of_description(build_id, described)
        if described.status is not WorkflowExecutionStatus.FAILED:
            return view
        try:
            await self._handle(described).result(follow_runs=False, rpc_timeout=RPC_LIMIT)
        except WorkflowFailureError as error:
            return replace(view, failure=failure_of(error.cause))
        return view

    # ---- Starting

    async def create(self, valid: ValidRequest) -> StartedBuild:
        """Start a build, or find the one that this request has started before.

        Raises ApiError ALREADY_EXISTS when the build id has another config, FAILED_PRECONDITION
        while the earlier build is being cancelled or the base is not published yet, NOT_FOUND when
        there is no such base or files of a COPY, PERMISSION_DENIED when the caller may not use the
        image.
        """
        if valid.config.from_template is None:
            require_image(valid.config.image)
        for _ in range(CREATE_ATTEMPTS):
            existing = await self._existing(valid)
            if existing is not None:
                return existing
            if valid.config.from_template is not None:
                await self._require_base(valid.config.from_template)
            await self._require_files(valid.config.steps)
            with contextlib.suppress(WorkflowAlreadyStartedError):  # another call was quicker
                return await self._start(BuildInput(config=valid.config, options=valid.options))
        raise _busy(valid.config.build_id)

    async def retry(self, build_id: str, template_id: str = "") -> StartedBuild:
        """Start a failed build again, with what it has finished.

        Its limits are the settings' of now, but for those that its request asked for.

        Raises ApiError FAILED_PRECONDITION when it has not failed.
        """
        view = await self.view(build_id, template_id)
        if view.state is not BuildState.FAILED:
            raise _not_failed(view)
        if view.config is None or view.done is None:
            raise temporal_unavailable("no worker answers for this build")
        again = BuildInput(
            config=view.config,
            options=options_for(view.config, self._settings),
            done=view.done,
        )
        try:
            return await self._start(again)
        except WorkflowAlreadyStartedError:
            raise _busy(build_id) from None

    async def _existing(self, valid: ValidRequest) -> StartedBuild | None:
        """Return the build that answers the request; None when one is to be started."""
        build_id = valid.config.build_id
        described = await self._describe(build_workflow_id(build_id))
        if described is None:
            return await self._existing_in_bucket(valid)
        state = state_of_description(described)
        if state is BuildState.CANCELLING:
            raise _being_cancelled(build_id)
        if state is BuildState.CANCELLED:
            return None
        if await self._was_deleted(build_id, described):
            await self._finish_delete(build_id)
            return None
        require_same_config(valid.config, await described.memo_value(CONFIG_SHA256_MEMO, ""))
        return StartedBuild(build_id, described.id, described.run_id)

    async def _existing_in_bucket(self, valid: ValidRequest) -> StartedBuild | None:
        view = await self._forgotten(valid.config.build_id)
        if view is None or view.config is None or view.state is BuildState.CANCELLED:
            return None
        require_same_config(valid.config, config_sha256(view.config))
        return StartedBuild(view.build_id, view.workflow_id, "")

    async def _require_base(self, base_id: str) -> None:
        """Let a base be a template that is published, of an image that the caller may use."""
        base = await self._bucket.metadata(base_id)
        if base is None:
            raise _no_base(base_id, await self._view(base_id))
        require_image(await self._image_below(base))

    async def _image_below(self, template: TemplateMetadata) -> str | None:
        """Return the image under templates that stand on templates; None when one has gone."""
        for _ in range(MAX_BASES):
            base_id = template.config.from_template
            if base_id is None:
                return template.config.image
            base = await self._bucket.metadata(base_id)
            if base is None:
                return None
            template = base
        return None

    async def _require_files(self, steps: Sequence[BuildStep]) -> None:
        """Refuse a COPY of files that nobody has sent."""
        missing = [
            Violation(f"template.steps[{number}].files_hash", "names files that were not sent")
            for number, step in enumerate(steps)
            if step.files_sha256 and not await self._bucket.has_files(step.files_sha256)
        ]
        if missing:
            raise ApiError(
                grpc.StatusCode.NOT_FOUND,
                "FILES_NOT_FOUND",
                "files of a COPY are not in the bucket",
                hint="Send them first (InitLayerFileUpload, as build --dockerfile does).",
                violations=missing,
            )

    async def _start(self, build: BuildInput) -> StartedBuild:
        config = build.config
        handle = await self._client.start_workflow(
            BuildTemplate.run,
            build,
            id=build_workflow_id(config.build_id),
            task_queue=WORKFLOW_TASK_QUEUE,
            # Not USE_EXISTING: that would take a build of another config for the same.
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            memo={CONFIG_SHA256_MEMO: config_sha256(config), IMAGE_MEMO: config.image},
            search_attributes=TypedSearchAttributes(
                [
                    SearchAttributePair(TEMPLATE_ID, config.template_id),
                    SearchAttributePair(BUILD_ID, config.build_id),
                    SearchAttributePair(IMAGE, config.image),
                    SearchAttributePair(BUILD_STATE, BuildState.BUILDING),
                ]
            ),
            static_summary=f"{config.template_id} · {config.image}",
            rpc_timeout=RPC_LIMIT,
        )
        _log.info(
            "build started",
            build_id=config.build_id,
            template_id=config.template_id,
            again=build.done is not None,
        )
        return StartedBuild(config.build_id, handle.id, handle.first_execution_run_id or "")

    # ---- Stopping

    async def cancel(self, build_id: str, template_id: str = "") -> None:
        """Stop a build and wait until all is undone. A build that is cancelled already is fine.

        Raises ApiError FAILED_PRECONDITION when it has ended in another way.
        """
        described = await self._describe(build_workflow_id(build_id))
        _require_template(build_id, template_id, described)
        if described is None or await self._was_deleted(build_id, described):
            raise build_not_found(build_id, template_id)
        _require_cancelled(build_id, await self._stop(described))
        _log.info("build cancelled", build_id=build_id)

    async def _stop(self, described: WorkflowExecutionDescription) -> WorkflowExecutionStatus:
        """Cancel a running build, wait until it has closed, and return how."""
        handle = self._handle(described)
        if described.status is WorkflowExecutionStatus.RUNNING:
            try:
                await handle.cancel(reason="asked by the API", rpc_timeout=RPC_LIMIT)
            except RPCError as error:  # it closes at this very moment
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise
            with contextlib.suppress(WorkflowFailureError):
                await handle.result(follow_runs=False)
            described = await handle.describe(rpc_timeout=RPC_LIMIT)
        assert described.status is not None
        return described.status

    # ---- Deleting

    async def delete(self, build_id: str, template_id: str = "") -> None:
        """Stop a build if it runs, then remove all that it has left. Twice is fine.

        Raises ApiError NOT_FOUND when nothing is known of such a build.
        """
        described = await self._describe(build_workflow_id(build_id))
        _require_template(build_id, template_id, described)
        if described is not None and described.status is WorkflowExecutionStatus.RUNNING:
            await self._stop(described)
        if described is not None and await self._was_deleted(build_id, described):
            await self._finish_delete(build_id)
            return
        await self._replace_earlier_delete(build_id, described)
        await self._run_delete(await self._delete_input(build_id, template_id))
        _log.info("build deleted", build_id=build_id, template_id=template_id)

    async def _delete_input(self, build_id: str, template_id: str) -> DeleteTemplateInput:
        view = await self._view(build_id)
        if view is None and not await self._bucket.has_objects(build_id):
            raise build_not_found(build_id, template_id)
        if view is not None and template_id and view.template_id not in ("", template_id):
            raise build_not_found(build_id, template_id)
        if view is not None and view.config is None:
            raise temporal_unavailable("no worker answers for this build")
        config = view.config if view else None
        return DeleteTemplateInput(
            template_id=view.template_id if view else template_id or "unknown",
            build_id=build_id,
            host=view.host or None if view else None,
            own_image=config.image if config and config.image_is_default else None,
            registry_auth=config.registry_auth if config else None,
            late_arrival_seconds=self._settings.late_arrival_seconds,
        )

    async def _run_delete(self, delete: DeleteTemplateInput) -> None:
        start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
            DeleteTemplate.run,
            delete,
            id=delete_workflow_id(delete.build_id),
            task_queue=WORKFLOW_TASK_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            static_summary=f"delete {delete.template_id} · {delete.build_id}",
        )
        with _update_errors():
            await self._client.execute_update_with_start_workflow(
                DeleteTemplate.wait_deleted, start_workflow_operation=start
            )

    async def _finish_delete(self, build_id: str) -> None:
        """Wait until a delete that has begun has removed everything."""
        handle = self._client.get_workflow_handle_for(
            DeleteTemplate.run, delete_workflow_id(build_id)
        )
        with _update_errors():
            try:
                await handle.execute_update(DeleteTemplate.wait_deleted)
            except RPCError as error:  # it has ended
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise

    async def _replace_earlier_delete(
        self, build_id: str, build: WorkflowExecutionDescription | None
    ) -> None:
        """End a delete that still waits for late arrivals of an earlier build of this id: it would
        answer for what it has deleted, not for what has been built since."""
        delete = await self._describe(delete_workflow_id(build_id))
        if build is None or delete is None or delete.start_time > build.start_time:
            return
        if delete.status is WorkflowExecutionStatus.RUNNING:
            await self._client.get_workflow_handle(delete.id, run_id=delete.run_id).terminate(
                reason="the build id was used again, and is deleted again", rpc_timeout=RPC_LIMIT
            )

    def _handle(self, described: WorkflowExecutionDescription) -> BuildHandle:
        return self._client.get_workflow_handle_for(
            BuildTemplate.run, described.id, run_id=described.run_id
        )


@contextlib.contextmanager
def _update_errors() -> Iterator[None]:
    """Translate the failures of an update, which wrap what the workflow raised."""
    try:
        yield
    except WorkflowUpdateFailedError as error:
        failure = failure_of(error.cause)
        raise ApiError(
            grpc.StatusCode.UNAVAILABLE,
            "DELETE_FAILED",
            failure.message,
            hint=failure.hint or "Delete it again.",
            retry_after_seconds=RETRY_SECONDS,
        ) from error
    except WorkflowUpdateRPCTimeoutOrCancelledError as error:
        if isinstance(error.__cause__, asyncio.CancelledError):
            raise error.__cause__ from None
        raise temporal_unavailable("the delete goes on; ask again") from error


def _require_template(
    build_id: str, template_id: str, described: WorkflowExecutionDescription | None
) -> None:
    if described is None or not template_id:
        return
    known = described.typed_search_attributes.get(TEMPLATE_ID) or template_id
    if known != template_id:
        raise build_not_found(build_id, template_id)


def _require_cancelled(build_id: str, status: WorkflowExecutionStatus) -> None:
    if status is WorkflowExecutionStatus.CANCELED:
        return
    if status is WorkflowExecutionStatus.COMPLETED:
        raise failed_precondition(
            "TEMPLATE_ALREADY_PUBLISHED",
            f"build {build_id} has been published and can no longer be cancelled",
            TemplateAlreadyPublishedError.hint,
        )
    raise failed_precondition(
        "BUILD_ALREADY_FAILED",
        f"build {build_id} has already failed",
        "Read its status; delete it to remove what it left.",
    )


def _no_base(base_id: str, view: BuildView | None) -> ApiError:
    if view is not None and not view.is_closed:
        return failed_precondition(
            "BASE_NOT_READY",
            f"template {base_id} is still being built",
            f"Wait until it is completed: template-manager status {base_id} --watch",
            retry_after_seconds=RETRY_SECONDS,
        )
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        "BASE_NOT_FOUND",
        f"there is no template {base_id} to build on",
        hint=TemplateNotFoundError.hint,
        violations=[Violation("template.from_template.build_id", "must be a completed build's")],
    )


def _not_failed(view: BuildView) -> ApiError:
    hints = {
        BuildState.COMPLETED: "Use the template, or build another one under a new build id.",
        BuildState.CANCELLED: "Create it again (template-manager build --build-id …).",
    }
    return failed_precondition(
        "BUILD_NOT_FAILED",
        f"build {view.build_id} is {view.state}: only a failed build can be retried",
        hints.get(view.state, "Wait until it has ended; cancel it if it hangs."),
    )


def _being_cancelled(build_id: str) -> ApiError:
    return failed_precondition(
        "BUILD_BEING_CANCELLED",
        f"build {build_id} is being cancelled",
        "Create it again when the cancel has finished.",
        retry_after_seconds=RETRY_SECONDS,
    )


def _busy(build_id: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.ABORTED,
        "BUILD_CHANGES",
        f"build {build_id} is being started and ended by other calls",
        hint="Send the request again.",
        retry_after_seconds=RETRY_SECONDS,
    )
