"""Ending builds: cancelling those that run, and deleting all that a build has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
import structlog
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import TemplateAlreadyPublishedError, failure_of
from activities.contract.inputs import DeleteTemplateInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, delete_workflow_id
from activities.contract.results import DeletedTemplate
from activities.contract.search_attributes import TEMPLATE_ID
from activities.contract.sources import FromImage
from activities.process.settings import Settings
from api.errors import RETRY_SECONDS, ApiError, failed_precondition, temporal_unavailable
from api.server.error_translation import build_not_found
from api.server.finding import RPC_LIMIT, BuildFinder, run_of_build
from api.server.history import BuildHistory
from api.server.view import BuildView
from workflows.delete_template import DeleteTemplate

_log = structlog.get_logger(__name__)


class BuildEnder:
    """Cancels and deletes builds. What it has begun goes on in Temporal when the caller leaves."""

    def __init__(self, client: Client, settings: Settings, finder: BuildFinder) -> None:
        self._client = client
        self._settings = settings
        self._finder = finder
        self._history = BuildHistory(client)

    async def cancel(self, build_id: str, template_id: str = "") -> None:
        """Stop a build and wait until all is undone. A build that is cancelled already is fine.

        Raises ApiError FAILED_PRECONDITION when it has ended in another way.
        """
        described = await self._described(build_id, template_id)
        if described is None or await self._finder.was_deleted(build_id, described):
            raise build_not_found(build_id, template_id)
        _require_cancelled(build_id, await self._stop(described))
        _log.info("build cancelled", build_id=build_id)

    async def delete(self, build_id: str, template_id: str = "") -> DeletedTemplate | None:
        """Stop a build if it runs, then remove all that it has left. Twice is fine.

        Returns what was removed; None when nothing is known of such a build.

        Raises ApiError NOT_FOUND when the build is of another template.
        """
        described = await self._described(build_id, template_id)
        if described is not None and described.status is WorkflowExecutionStatus.RUNNING:
            await self._stop(described)
        if described is not None and await self._finder.was_deleted(build_id, described):
            await self.finish_delete(build_id)
            return DeletedTemplate()
        await self._replace_earlier_delete(build_id, described)
        delete = await self._delete_input(build_id, template_id)
        if delete is None:
            return None
        await self._finder.keep_id(build_id)
        deleted = await self._run_delete(delete)
        _log.info("build deleted", build_id=build_id, template_id=template_id)
        return deleted

    async def finish_delete(self, build_id: str) -> None:
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

    async def _described(
        self, build_id: str, template_id: str
    ) -> WorkflowExecutionDescription | None:
        described = await self._finder.describe(build_id)
        _require_template(build_id, template_id, described)
        return described

    async def _stop(self, described: WorkflowExecutionDescription) -> WorkflowExecutionStatus:
        """Cancel a running build, wait until it has closed, and return how."""
        handle = run_of_build(self._client, described.id, described.run_id)
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

    async def _delete_input(self, build_id: str, template_id: str) -> DeleteTemplateInput | None:
        view = await self._finder.find(build_id)
        tenant = view.tenant if view else await self._finder.owner_of_leftovers(build_id)
        if tenant is None:
            return None
        if view is not None and template_id and view.template_id not in ("", template_id):
            raise build_not_found(build_id, template_id)
        own = await self._own_image(view) if view is not None else None
        return DeleteTemplateInput(
            template_id=view.template_id if view else template_id or "unknown",
            build_id=build_id,
            host=view.host or None if view else None,
            own_image=own.own_tag if own else None,
            registry_auth=own.login if own else None,
            late_arrival_seconds=self._settings.late_arrival_seconds,
            tenant=tenant,
        )

    async def _own_image(self, view: BuildView) -> FromImage | None:
        """Return the service's own image that a build was made of, with the registry's login.

        What an archive or a template's metadata tells comes without it: only the history has it.
        """
        started = await self._history.started_with(view)
        config = started.config if started is not None else view.config
        if config is None:
            raise temporal_unavailable("no worker answers for this build")
        source = config.source
        return source if isinstance(source, FromImage) and source.is_own else None

    async def _run_delete(self, delete: DeleteTemplateInput) -> DeletedTemplate:
        start = WithStartWorkflowOperation(
            DeleteTemplate.run,
            delete,
            id=delete_workflow_id(delete.build_id),
            task_queue=WORKFLOW_TASK_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            static_summary=f"delete {delete.template_id} · {delete.build_id}",
        )
        with _update_errors():
            return await self._client.execute_update_with_start_workflow(
                DeleteTemplate.wait_deleted, start_workflow_operation=start
            )

    async def _replace_earlier_delete(
        self, build_id: str, build: WorkflowExecutionDescription | None
    ) -> None:
        """End a delete that still waits for late arrivals of an earlier build of this id: it would
        answer for what it has deleted, not for what has been built since."""
        delete = await self._finder.describe_delete(build_id)
        if build is None or delete is None or delete.start_time > build.start_time:
            return
        if delete.status is WorkflowExecutionStatus.RUNNING:
            await self._client.get_workflow_handle(delete.id, run_id=delete.run_id).terminate(
                reason="the build id was used again, and is deleted again", rpc_timeout=RPC_LIMIT
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
