"""Finding builds: in Temporal, which runs and remembers them, and in the bucket.

Only the caller's: what is another tenant's is looked for as what does not exist is, and not found.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import failure_of
from activities.contract.names import DEFAULT_TENANT, build_workflow_id, delete_workflow_id
from activities.contract.status import BuildResult, BuildState, BuildStatus
from api.server.access import Right, current_caller
from api.server.error_translation import build_id_taken, build_not_found
from api.server.template_bucket import TemplateBucket
from api.server.tenancy import is_visible, is_visible_workflow
from api.server.view import (
    BuildView,
    view_of_description,
    view_of_metadata,
    view_of_status,
    with_description,
)
from workflows.build_template import BuildTemplate

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.metadata import TemplateMetadata

RPC_LIMIT = timedelta(seconds=10)
QUERY_LIMIT = timedelta(seconds=3)

BuildHandle = WorkflowHandle[BuildTemplate, BuildResult]

_log = structlog.get_logger(__name__)


class BuildFinder:
    """The builds that Temporal runs or remembers, and those that are in the bucket."""

    def __init__(self, client: Client, bucket: TemplateBucket) -> None:
        self._client = client
        self._bucket = bucket

    async def view(self, build_id: str, template_id: str = "") -> BuildView:
        """Tell everything about a build. Raises ApiError NOT_FOUND; a deleted build is not there.

        `template_id`, if given, must be the build's.
        """
        view = await self.find(build_id)
        if view is None or (template_id and view.template_id not in ("", template_id)):
            raise build_not_found(build_id, template_id)
        return view

    async def find(self, build_id: str) -> BuildView | None:
        """Tell everything about a build; None when it is not there, or was deleted."""
        described = await self.describe(build_id)
        if described is None:
            return await self.forgotten(build_id)
        if await self.was_deleted(build_id, described):
            return None
        status = await self._query(described)
        view = replace(view_of_status(status), is_answered=True) if status else None
        if view is None and described.status is not WorkflowExecutionStatus.RUNNING:
            view = await self._archived(build_id) or await self._ended(build_id, described)
        view = view or view_of_description(build_id, described)
        return await with_description(view, described, self._client.data_converter)

    async def forgotten(self, build_id: str) -> BuildView | None:
        """Find a build that Temporal does not know (any more): in the bucket."""
        metadata = await self.template(build_id)
        if metadata is not None:
            return view_of_metadata(metadata, self._bucket.name)
        view = await self._archived(build_id)
        # Without its metadata a completed build's template has been deleted.
        return None if view is None or view.state is BuildState.COMPLETED else view

    async def describe(self, build_id: str) -> WorkflowExecutionDescription | None:
        """Return what Temporal knows of a build's latest run; None when it knows none."""
        described = await self._describe(build_workflow_id(build_id))
        if described is None or not await is_visible_workflow(described):
            return None
        return described

    async def describe_delete(self, build_id: str) -> WorkflowExecutionDescription | None:
        """Return what Temporal knows of the latest delete of a build that the caller sees."""
        return await self._describe(delete_workflow_id(build_id))

    async def template(self, build_id: str) -> TemplateMetadata | None:
        """Return a template's metadata, or None when there is no such template."""
        metadata = await self._bucket.metadata(build_id)
        return metadata if metadata and is_visible(metadata.config.tenant) else None

    async def owner_of_leftovers(self, build_id: str) -> str | None:
        """Return the tenant of what the bucket has of a build that nobody remembers, or None."""
        owner = await self._bucket.owner(build_id) or DEFAULT_TENANT
        return owner if await self._bucket.has_objects(build_id) and is_visible(owner) else None

    async def require_id(self, build_id: str, tenant: str) -> None:
        """Raise ApiError ALREADY_EXISTS when a build id is another tenant's, whoever asks."""
        owner = await self._bucket.owner(build_id)
        if owner is None and tenant != DEFAULT_TENANT and await self._was_used(build_id):
            owner = DEFAULT_TENANT  # before there were tenants
        if owner not in (None, tenant):
            raise build_id_taken(build_id)

    async def claim_id(self, build_id: str, tenant: str) -> None:
        """Bind a build id to its tenant for ever. Raises ApiError ALREADY_EXISTS."""
        if await self._bucket.claim(build_id, tenant) != tenant:
            raise build_id_taken(build_id)

    async def keep_id(self, build_id: str) -> None:
        """Bind the id of a build of before there were tenants, whose last traces are to go."""
        await self._bucket.claim(build_id, DEFAULT_TENANT)

    async def _was_used(self, build_id: str) -> bool:
        return bool(
            await self._describe(build_workflow_id(build_id))
            or await self._bucket.archived_log(build_id, DEFAULT_TENANT)
            or await self._bucket.has_objects(build_id)
        )

    async def _describe(self, workflow_id: str) -> WorkflowExecutionDescription | None:
        try:
            handle = self._client.get_workflow_handle(workflow_id)
            return await handle.describe(rpc_timeout=RPC_LIMIT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise

    async def was_deleted(self, build_id: str, build: WorkflowExecutionDescription) -> bool:
        """Whether a delete has begun after this build, and has not failed."""
        if build.status is WorkflowExecutionStatus.RUNNING:
            return False  # a delete stops it first
        delete = await self.describe_delete(build_id)
        if delete is None or delete.start_time < build.start_time:
            return False
        running_or_done = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.COMPLETED)
        return delete.status in running_or_done

    def _run(self, described: WorkflowExecutionDescription) -> BuildHandle:
        return run_of_build(self._client, described.id, described.run_id)

    async def _query(self, described: WorkflowExecutionDescription) -> BuildStatus | None:
        """Ask the workflow itself; None when no worker answers."""
        try:
            return await self._run(described).query(BuildTemplate.status, rpc_timeout=QUERY_LIMIT)
        except WorkflowQueryFailedError:
            return None
        except RPCError as error:
            if error.status is RPCStatusCode.UNAVAILABLE:
                raise
            _log.warning("no worker answers a query", workflow_id=described.id, error=str(error))
            return None

    async def _archived(self, build_id: str) -> BuildView | None:
        archived = await self._bucket.archived_log(build_id, await self._place(build_id))
        return view_of_status(archived[0]) if archived else None

    async def _place(self, build_id: str) -> str:
        """Return below which tenant the caller looks: its own, or an operator the build's."""
        caller = current_caller.get()
        if caller.right is not Right.OPERATOR:
            return caller.tenant
        return await self._bucket.owner(build_id) or DEFAULT_TENANT

    async def _ended(self, build_id: str, described: WorkflowExecutionDescription) -> BuildView:
        """Tell what the end of the workflow itself tells: its failure, with no worker's help."""
        view = view_of_description(build_id, described)
        if described.status is not WorkflowExecutionStatus.FAILED:
            return view
        try:
            await self._run(described).result(follow_runs=False, rpc_timeout=RPC_LIMIT)
        except WorkflowFailureError as error:
            return replace(view, failure=failure_of(error.cause))
        return view


def run_of_build(client: Client, workflow_id: str, run_id: str) -> BuildHandle:
    """Return the handle of one run of a build."""
    return client.get_workflow_handle_for(BuildTemplate.run, workflow_id, run_id=run_id)
