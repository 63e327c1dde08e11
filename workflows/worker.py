"""The worker for workflows, and for the activities that need no KVM host."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from activities.contract.names import SWEEP_BUCKET_WORKFLOW, WORKFLOW_TASK_QUEUE
from activities.process.health import temporal_readiness
from activities.process.lifecycle import run_until_signalled
from activities.process.metrics import runtime_for
from activities.process.settings import Settings
from activities.process.sweep_schedule import BUCKET, schedule_sweep
from activities.process.temporal import (
    GRACEFUL_SHUTDOWN,
    MAX_HEARTBEAT_THROTTLE,
    ErrorInterceptor,
    connect,
    register_search_attributes,
)
from workflows.build_template import BuildTemplate
from workflows.delete_template import DeleteTemplate
from workflows.inspect_host import InspectHost
from workflows.sweep import SweepBucket, SweepHost

WORKFLOWS: Sequence[type] = (
    BuildTemplate,
    DeleteTemplate,
    SweepHost,
    SweepBucket,
    InspectHost,
)


def sandbox() -> SandboxedWorkflowRunner:
    """Return the workflow sandbox. Our own contract modules are passed through: pure data."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules(
            "activities", "pydantic_settings", "structlog", "dotenv", "opentelemetry"
        )
    )


def workflow_worker(
    client: Client, activities: Sequence[Callable[..., Any]], task_queue: str = WORKFLOW_TASK_QUEUE
) -> Worker:
    """Return a worker for all workflows and the given activities."""
    return Worker(
        client,
        task_queue=task_queue,
        workflows=WORKFLOWS,
        activities=activities,
        interceptors=[ErrorInterceptor()],
        workflow_runner=sandbox(),
        max_heartbeat_throttle_interval=MAX_HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
    )


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises TemporalUnavailableError, AddressTakenError, and what the worker fails with.
    """
    identity = f"worker@{socket.gethostname()}:{os.getpid()}"
    client = await connect(identity, runtime=runtime_for(settings))
    await register_search_attributes(client)
    await schedule_sweep(client, settings, SWEEP_BUCKET_WORKFLOW, BUCKET)
    worker = workflow_worker(client, _activities(settings, client))
    await run_until_signalled([worker], settings, temporal_readiness(client))


def _activities(settings: Settings, client: Client) -> list[Callable[..., Any]]:
    # Loaded here, not above: a process that only replays histories needs no object store.
    from activities.host.sweep import BucketSweep, describe_with
    from activities.process.sealing import Sealer
    from activities.store.bucket import Bucket
    from activities.store.log_archive import BucketLogActivities
    from activities.template.artifacts import BucketUploadUndoActivities
    from activities.template.deletion import BucketDeletionActivities

    bucket = Bucket(settings.bucket)
    log = BucketLogActivities(bucket)
    sweep = BucketSweep(
        bucket, describe_with(client), late_arrival_seconds=settings.late_arrival_seconds
    )
    deletion = BucketDeletionActivities(
        bucket, Sealer(settings.secret_keys), settings.insecure_registries
    )
    return [
        BucketUploadUndoActivities(bucket).discard_upload,
        log.archive_log,
        deletion.delete_objects,
        deletion.delete_image_tag,
        deletion.remove_late_arrivals,
        sweep.sweep_bucket,
    ]
