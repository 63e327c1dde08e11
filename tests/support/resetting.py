"""Temporal's Reset, as the Web UI does it."""

from __future__ import annotations

import uuid

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client


async def reset_before(client: Client, workflow_id: str, activity: str) -> str:
    """Reset a workflow to just before it schedules an activity; returns the new run's id."""
    handle = client.get_workflow_handle(workflow_id)
    description = await handle.describe()
    decided = 0
    async for event in handle.fetch_history_events():
        if event.HasField("workflow_task_completed_event_attributes"):
            decided = event.event_id
        if event.activity_task_scheduled_event_attributes.activity_type.name == activity:
            break
    answer = await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(
                workflow_id=workflow_id, run_id=description.run_id
            ),
            reason="test",
            workflow_task_finish_event_id=decided,
            request_id=str(uuid.uuid4()),
        )
    )
    return answer.run_id
