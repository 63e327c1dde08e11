"""The KVM hosts of the service, asked through Temporal."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta

from temporalio.client import Client, WorkflowFailureError

from activities.contract.inputs import HostRequest
from activities.contract.names import INSPECT_HOST_WORKFLOW, WORKFLOW_TASK_QUEUE
from activities.contract.results import HostFacts
from activities.process.sweep_schedule import swept_hosts

LIMIT = timedelta(seconds=20)


async def ask_host(client: Client, host: str, draining: bool | None = None) -> HostFacts | None:
    """Return what a host tells; None when it is away. With `draining` it is told that first."""
    try:
        facts: HostFacts = await client.execute_workflow(
            INSPECT_HOST_WORKFLOW,
            args=[host, HostRequest(draining=draining)],
            id=f"inspect-host-{host}-{uuid.uuid4()}",
            task_queue=WORKFLOW_TASK_QUEUE,
            execution_timeout=LIMIT,
            result_type=HostFacts,
        )
    except WorkflowFailureError:
        return None
    return facts


async def all_hosts(client: Client) -> dict[str, HostFacts | None]:
    """Ask all hosts at once."""
    names = await swept_hosts(client)
    facts = await asyncio.gather(*(ask_host(client, name) for name in names))
    return dict(zip(names, facts, strict=True))
