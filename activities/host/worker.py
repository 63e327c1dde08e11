"""The process on a KVM host: three workers that share one ledger, one disk and one bucket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import docker
import structlog
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import FixedSizeSlotSupplier, Worker, WorkerTuner

from activities.contract.errors import TemplateManagerError
from activities.contract.inputs import SweepInput
from activities.contract.names import (
    SHARED_HOST_TASK_QUEUE,
    SWEEP_HOST_WORKFLOW,
    lease_task_queue,
    step_task_queue,
)
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir, make_closed
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.host.facts import KvmHostFactsActivities, is_draining
from activities.host.hold import KvmHostActivities
from activities.host.memory import HostMemory
from activities.host.orphans import Describe, describe_with
from activities.host.served import Activity, served_by, step_activities
from activities.host.sweep import HostSweep
from activities.host.tool_versions import require_safe_tools
from activities.image.docker_daemon import daemon_info, docker_errors, make_docker_client
from activities.process.allocator import give_memory_back
from activities.process.health import Readiness, temporal_readiness
from activities.process.lifecycle import run_until_signalled
from activities.process.metrics import runtime_for, show_host
from activities.process.settings import Settings
from activities.process.sweep_schedule import schedule_sweep
from activities.process.temporal import (
    connect,
    make_worker,
    register_search_attributes,
)
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.log_stream import LinesWithResult
from activities.step.vm_requirements import require_host
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects

# A build runs one step at a time, undoing included, and sends layers beside it; a few more leave
# room for deletes.
AT_ONCE_PER_SLOT = 2
EXTRA_STEPS = 8
THREADS_PER_SLOT = 8
SHOW_SECONDS = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Host:
    """Everything that the activities of one host share."""

    settings: Settings
    ledger: LeaseLedger
    admission: Admission
    hold: KvmHostActivities
    steps: Sequence[Activity]
    sweep: HostSweep
    docker_client: docker.APIClient


def assemble(settings: Settings, describe: Describe) -> Host:
    """Make a host of its settings: clients, ledger, checkpoints and activities."""
    data_dir = DataDir(settings.data_dir)
    make_closed(data_dir.root)
    ledger = LeaseLedger(data_dir)
    docker_client = make_docker_client()
    room, memory = room_of(settings, docker_client), HostMemory.of(settings)
    admission = Admission(ledger, settings.host_slots, room, memory)
    bucket = Bucket(settings.bucket)
    leases = LeaseObjects(bucket)
    store = CheckpointStore(data_dir, settings.host)
    fit = partial(require_host, settings)
    hold = KvmHostActivities(settings.host, ledger, leases, admission, fit)
    facts = KvmHostFactsActivities(settings, ledger, admission, store)
    sweep = HostSweep(settings, ledger, store, leases, docker_client, describe)
    steps = step_activities(settings, ledger, store, bucket, leases, docker_client)
    return Host(
        settings=settings,
        ledger=ledger,
        admission=admission,
        hold=hold,
        steps=[*steps, *served_by(sweep, facts)],
        sweep=sweep,
        docker_client=docker_client,
    )


def room_of(settings: Settings, docker_client: docker.APIClient) -> Room:
    """Return the disks of this host: its own, and Docker's where that answers."""
    directories = [settings.data_dir]
    with contextlib.suppress(TemplateManagerError), docker_errors():
        directories.append(daemon_info(docker_client).directory)
    return Room(tuple(directories), settings.min_free_disk_mb * MIB)


def host_workers(
    client: Client,
    settings: Settings,
    admission: Admission,
    hold: KvmHostActivities,
    steps: Sequence[Activity],
) -> list[Worker]:
    """Return the workers for new builds, for builds taken up again, and for steps."""
    name, slots = settings.host, settings.host_slots
    fixed = FixedSizeSlotSupplier
    queues: list[tuple[str, Sequence[Activity], FixedSizeSlotSupplier | Admission]] = [
        (lease_task_queue(name), served_by(hold), fixed(1000)),
        (step_task_queue(name), steps, fixed(slots * AT_ONCE_PER_SLOT + EXTRA_STEPS)),
        (SHARED_HOST_TASK_QUEUE, [hold.hold_host], admission),
    ]
    return [
        make_worker(
            client,
            queue,
            activities,
            tuner=tuner_for(supplier),
            interceptors=[LinesWithResult()],
        )
        for queue, activities, supplier in queues
    ]


def tuner_for(activities: FixedSizeSlotSupplier | Admission) -> WorkerTuner:
    """Return a worker's slots: these for activities, and none that count for anything else."""
    unused = FixedSizeSlotSupplier(1)
    return WorkerTuner.create_composite(
        workflow_supplier=unused,
        activity_supplier=activities,
        local_activity_supplier=unused,
        nexus_supplier=unused,
    )


async def run(settings: Settings) -> None:
    """Run this host until SIGTERM or SIGINT.

    Raises UnsafeToolsError, TemporalUnavailableError, AddressTakenError, and what a worker fails
    with.
    """
    give_memory_back()
    threads = ThreadPoolExecutor(settings.host_slots * THREADS_PER_SLOT + EXTRA_STEPS)
    asyncio.get_running_loop().set_default_executor(threads)
    runtime = runtime_for(settings)
    client = await connect(f"host@{settings.host}:{os.getpid()}", runtime=runtime)
    await register_search_attributes(client)
    host = assemble(settings, describe_with(client))
    await asyncio.to_thread(require_safe_tools, settings, host.docker_client)
    await schedule_sweep(client, settings, SWEEP_HOST_WORKFLOW, settings.host)
    opening = asyncio.create_task(open_for_builds(client, host))
    showing = asyncio.create_task(_show(host, runtime)) if runtime else None
    try:
        workers = host_workers(client, settings, host.admission, host.hold, host.steps)
        await run_until_signalled(workers, settings, _readiness(client, host))
    finally:
        opening.cancel()
        if showing:
            showing.cancel()


def _readiness(client: Client, host: Host) -> Readiness:
    temporal = temporal_readiness(client)

    async def check() -> str:
        try:
            await asyncio.to_thread(host.docker_client.ping)
        except (docker.errors.DockerException, OSError):
            return "Docker does not answer"
        return await temporal()

    return check


async def _show(host: Host, runtime: Runtime) -> None:
    """Show how full the host is, for ever."""
    settings = host.settings
    while True:
        free = shutil.disk_usage(settings.data_dir).free
        slots, used = settings.host_slots, host.ledger.count()
        show_host(runtime.metric_meter, settings.host, slots, used, free)
        await asyncio.sleep(SHOW_SECONDS)


async def open_for_builds(client: Client, host: Host) -> None:
    """Wait for builds that this host still owns to come back, then take new ones."""
    if host.ledger.count():
        await asyncio.sleep(host.settings.restart_grace_seconds)
    for entry in host.ledger.entries():
        if not await is_open(client, entry.workflow_id):
            _log.info("build has ended while this host was away", build_id=entry.build_id)
            host.ledger.remove(entry.build_id, entry.number)
    host.admission.open = not is_draining(DataDir(host.settings.data_dir))
    _log.info("taking builds", slots=host.settings.host_slots, free=host.admission.free)
    await _sweep_at_start(host)


async def _sweep_at_start(host: Host) -> None:
    try:
        report = await host.sweep.sweep(SweepInput())
    except TemplateManagerError as error:  # the schedule comes back to it
        _log.warning("could not sweep at start", error=error.message)
        return
    for item in report.items:
        _log.info("swept", **item.model_dump())


async def is_open(client: Client, workflow_id: str) -> bool:
    """Ask Temporal whether a workflow is still running. Raises RPCError when it cannot tell."""
    try:
        description = await client.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return False
        raise
    return description.status is WorkflowExecutionStatus.RUNNING
