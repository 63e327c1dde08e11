"""The program `template-manager worker`: workflows, and the activities that need no KVM host."""

from __future__ import annotations

import os
import socket

from activities.contract.names import SWEEP_BUCKET_WORKFLOW, WORKFLOW_TASK_QUEUE
from activities.host.served import bucket_activities, served_by
from activities.process.health import temporal_readiness
from activities.process.lifecycle import run_until_signalled
from activities.process.metrics import runtime_for
from activities.process.settings import Settings
from activities.process.sweep_schedule import BUCKET, schedule_sweep
from activities.process.temporal import connect, make_worker, register_search_attributes
from api.server.fitting_hosts import FittingHosts
from api.server.tenant_removal import TenantRemover
from workflows.worker import WORKFLOWS, sandbox


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises TenantsFileError, TemporalUnavailableError, AddressTakenError, and what the worker fails
    with.
    """
    identity = f"worker@{socket.gethostname()}:{os.getpid()}"
    client = await connect(identity, runtime=runtime_for(settings))
    await register_search_attributes(client)
    await schedule_sweep(client, settings, SWEEP_BUCKET_WORKFLOW, BUCKET)
    worker = make_worker(
        client,
        WORKFLOW_TASK_QUEUE,
        [
            *bucket_activities(settings, client),
            *served_by(TenantRemover(client, settings), FittingHosts(client)),
        ],
        workflows=WORKFLOWS,
        workflow_runner=sandbox(),
    )
    await run_until_signalled([worker], settings, temporal_readiness(client))
