"""What Temporal's history tells of a build. Reading it takes no worker, as a query does.

After a build's end it is all that still has the login of its registry: what is in the bucket is
written without.
"""

from __future__ import annotations

from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowHistoryEventAsyncIterator
from temporalio.converter import DataConverter
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

    async def started_with(self, view: BuildView) -> BuildInput | None:
        """Return what the run was started with; None when Temporal has forgotten it."""
        if not view.run_id:
            return None
        try:
            first = await anext(self._events(view, page_size=1))
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        return await input_in(first, self._client.data_converter)

    async def final_status(self, view: BuildView) -> BuildStatus | None:
        """Return the status that the run gave to the archive at its end.

        None when it did not come to that: it runs, or was ended from outside, or is forgotten.
        """
        if not view.run_id:
            return None
        archiving = [event async for event in self._events(view) if _archives(event)]
        if not archiving:
            return None
        return await status_in(archiving[-1], self._client.data_converter)

    def _events(
        self, view: BuildView, page_size: int | None = None
    ) -> WorkflowHistoryEventAsyncIterator:
        run = run_of_build(self._client, view.workflow_id, view.run_id)
        return run.fetch_history_events(page_size=page_size, rpc_timeout=RPC_LIMIT)


async def input_in(first: HistoryEvent, converter: DataConverter) -> BuildInput:
    """Return what a build was started with, by the first event of its history."""
    payloads = first.workflow_execution_started_event_attributes.input.payloads
    build: BuildInput
    [build] = await converter.decode(payloads, [BuildInput])
    return build


async def status_in(archiving: HistoryEvent, converter: DataConverter) -> BuildStatus:
    """Return a build's final status, by the event that has its log archived."""
    payloads = archiving.activity_task_scheduled_event_attributes.input.payloads
    archive: ArchiveLogInput
    [archive] = await converter.decode(payloads, [ArchiveLogInput])
    return archive.final_status


def _archives(event: HistoryEvent) -> bool:
    return event.activity_task_scheduled_event_attributes.activity_type.name == ARCHIVE_ACTIVITY
