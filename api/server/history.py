"""What Temporal's history tells of a build. Reading it takes no worker, as a query does.

After a build's end it is all that still has the login of its registry: what is in the bucket is
written without.
"""

from __future__ import annotations

from temporalio.client import Client, WorkflowHistoryEventAsyncIterator
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.inputs import ArchiveLogInput, BuildInput
from activities.contract.status import BuildStatus
from api.server.finding import RPC_LIMIT, run_of_build
from api.server.view import BuildView

ARCHIVE_ACTIVITY = "archive_log"


class BuildHistory:
    """Reads the history of the run that a view is of."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._converter = client.data_converter

    async def started_with(self, view: BuildView) -> BuildInput | None:
        """Return what the run was started with; None when Temporal has forgotten it."""
        if not view.run_id:
            return None
        try:
            started = await anext(self._events(view, page_size=1))
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        payloads = started.workflow_execution_started_event_attributes.input.payloads
        build: BuildInput
        [build] = await self._converter.decode(payloads, [BuildInput])
        return build

    async def final_status(self, view: BuildView) -> BuildStatus | None:
        """Return the status that the run gave to the archive at its end.

        None when it did not come to that: it runs, or was ended from outside, or is forgotten.
        """
        payloads = None
        if view.run_id:
            async for event in self._events(view):
                scheduled = event.activity_task_scheduled_event_attributes
                if scheduled.activity_type.name == ARCHIVE_ACTIVITY:
                    payloads = scheduled.input.payloads
        if payloads is None:
            return None
        archive: ArchiveLogInput
        [archive] = await self._converter.decode(payloads, [ArchiveLogInput])
        return archive.final_status

    def _events(
        self, view: BuildView, page_size: int | None = None
    ) -> WorkflowHistoryEventAsyncIterator:
        run = run_of_build(self._client, view.workflow_id, view.run_id)
        return run.fetch_history_events(page_size=page_size, rpc_timeout=RPC_LIMIT)
