"""The worker for workflows, and for the activities that need no KVM host."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from temporalio.client import Client
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from activities.models import WORKFLOW_TASK_QUEUE
from activities.settings import Settings
from activities.temporal import (
    GRACEFUL_SHUTDOWN,
    MAX_HEARTBEAT_THROTTLE,
    ErrorInterceptor,
    connect,
    register_search_attributes,
)
from workflows.build_template import BuildTemplate
from workflows.delete_template import DeleteTemplate

WORKFLOWS: Sequence[type] = (BuildTemplate, DeleteTemplate)

_log = structlog.get_logger(__name__)


def sandbox() -> SandboxedWorkflowRunner:
    """Return the workflow sandbox. Our own contract modules are passed through: pure data."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules(
            "activities", "pydantic_settings", "structlog", "dotenv"
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
    """Run until SIGTERM or SIGINT. Raises when Temporal cannot be reached or the worker fails."""
    client = await connect(f"worker@{socket.gethostname()}:{os.getpid()}")
    await register_search_attributes(client)
    worker = workflow_worker(client, _activities(settings))
    await run_until_signalled([worker], settings)


async def run_until_signalled(workers: Sequence[Worker], settings: Settings) -> None:
    """Run workers; a signal drains them, a fatal error of one ends them all and is raised."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    running = [asyncio.create_task(worker.run()) for worker in workers]
    waiting = asyncio.create_task(stopped.wait())
    _mark_ready(settings, True)
    _log.info("ready", task_queues=[worker.task_queue for worker in workers])
    await asyncio.wait([*running, waiting], return_when=asyncio.FIRST_COMPLETED)
    _mark_ready(settings, False)
    _log.info("stopping")
    await asyncio.gather(*(worker.shutdown() for worker in workers), return_exceptions=True)
    waiting.cancel()
    await asyncio.gather(*running)


def _mark_ready(settings: Settings, ready: bool) -> None:
    if settings.ready_file is None:
        return
    if ready:
        settings.ready_file.touch()
    else:
        settings.ready_file.unlink(missing_ok=True)


def _activities(settings: Settings) -> list[Callable[..., Any]]:
    # Loaded here, not above: a process that only replays histories needs no object store.
    from activities.artifacts import BucketArtifactActivities
    from activities.bucket import Bucket
    from activities.build_log_archive import BucketLogActivities
    from activities.deletion import BucketDeletionActivities

    raise NotImplementedError
