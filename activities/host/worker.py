"""The process on a KVM host: three workers that share one ledger, one disk and one bucket."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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
from activities.host.admission import Admission
from activities.host.checkpoints import HostCheckpointActivities
from activities.host.facts import KvmHostFactsActivities, is_draining
from activities.host.hold import KvmHostActivities
from activities.host.sweep import Describe, HostSweep, describe_with
from activities.image.docker_daemon import make_docker_client
from activities.image.docker_steps import DockerImageStepActivities
from activities.image.pull import DockerImageActivities
from activities.microvm.microvm import HostMicrovmActivities
from activities.microvm.network import NetnsNetworkActivities
from activities.process.health import Readiness, temporal_readiness
from activities.process.lifecycle import run_until_signalled
from activities.process.metrics import runtime_for, show_host
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.process.sweep_schedule import schedule_sweep
from activities.process.temporal import (
    GRACEFUL_SHUTDOWN,
    MAX_HEARTBEAT_THROTTLE,
    ErrorInterceptor,
    connect,
    register_search_attributes,
)
from activities.rootfs.rootfs import HostRootfsActivities
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from activities.template.artifacts import BucketArtifactActivities

# A build runs one step at a time, undoing included; a few more than slots leave room for deletes.
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
    hold: Sequence[Callable[..., Any]]
    steps: Sequence[Callable[..., Any]]
    sweep: HostSweep
    docker_client: docker.APIClient


def assemble(settings: Settings, describe: Describe) -> Host:
    """Make a host of its settings: clients, ledger, checkpoints and activities."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    ledger = LeaseLedger(settings.data_dir)
    admission = Admission(ledger, settings.host_slots)
    bucket = Bucket(settings.bucket)
    leases = LeaseObjects(bucket)
    store = CheckpointStore(settings.data_dir, settings.host)
    hold = KvmHostActivities(settings.host, ledger, leases, admission)
    facts = KvmHostFactsActivities(settings, ledger, admission, store)
    docker_client = make_docker_client()
    sweep = HostSweep(settings, ledger, store, leases, docker_client, describe)
    steps = _steps(settings, ledger, store, bucket, leases, docker_client)
    return Host(
        settings=settings,
        ledger=ledger,
        admission=admission,
        hold=[hold.hold_host, hold.release_host],
        steps=[*steps, sweep.sweep_host, facts.tell_host],
        sweep=sweep,
        docker_client=docker_client,
    )


def _steps(  # noqa: PLR0917 # what a host has, in the order in which it is assembled
    settings: Settings,
    ledger: LeaseLedger,
    store: CheckpointStore,
    bucket: Bucket,
    leases: LeaseObjects,
    docker_client: docker.APIClient,
) -> list[Callable[..., Any]]:
    image = DockerImageActivities(
        settings, ledger, Sealer(settings.secret_keys), make_docker_client
    )
    image_steps = DockerImageStepActivities(settings, ledger, bucket, docker_client)
    rootfs = HostRootfsActivities(settings, ledger, store, docker_client)
    network = NetnsNetworkActivities(settings, ledger)
    microvm = HostMicrovmActivities(settings, ledger, store)
    checkpoints = HostCheckpointActivities(settings, ledger, store)
    artifacts = BucketArtifactActivities(settings, bucket, ledger, store, leases)
    return [
        image.pull_image,
        image_steps.build_image,
        image_steps.import_template,
        rootfs.build_rootfs,
        rootfs.clean_up_rootfs,
        checkpoints.find_snapshot,
        network.set_up_network,
        network.tear_down_network,
        microvm.start_vm,
        microvm.wait_until_ready,
        microvm.snapshot_vm,
        microvm.verify_snapshot,
        microvm.kill_vm,
        artifacts.upload_artifact,
        artifacts.publish_template,
        checkpoints.discard_checkpoints,
    ]


def host_workers(client: Client, host: Host) -> list[Worker]:
    """Return the workers for new builds, for builds taken up again, and for steps."""
    name, slots = host.settings.host, host.settings.host_slots

    def worker(queue: str, activities: Sequence[Callable[..., Any]], tuner: WorkerTuner) -> Worker:
        return Worker(
            client,
            task_queue=queue,
            activities=activities,
            interceptors=[ErrorInterceptor()],
            tuner=tuner,
            max_heartbeat_throttle_interval=MAX_HEARTBEAT_THROTTLE,
            graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        )

    fixed = FixedSizeSlotSupplier
    return [
        worker(lease_task_queue(name), host.hold, _tuner(fixed(1000))),
        worker(step_task_queue(name), host.steps, _tuner(fixed(slots + EXTRA_STEPS))),
        worker(SHARED_HOST_TASK_QUEUE, host.hold[:1], _tuner(host.admission)),
    ]


def _tuner(activities: FixedSizeSlotSupplier | Admission) -> WorkerTuner:
    unused = FixedSizeSlotSupplier(1)
    return WorkerTuner.create_composite(
        workflow_supplier=unused,
        activity_supplier=activities,
        local_activity_supplier=unused,
        nexus_supplier=unused,
    )


async def run(settings: Settings) -> None:
    """Run this host until SIGTERM or SIGINT.

    Raises TemporalUnavailableError, AddressTakenError, and what a worker fails with.
    """
    threads = ThreadPoolExecutor(settings.host_slots * THREADS_PER_SLOT + EXTRA_STEPS)
    asyncio.get_running_loop().set_default_executor(threads)
    runtime = runtime_for(settings)
    client = await connect(f"host@{settings.host}:{os.getpid()}", runtime=runtime)
    await register_search_attributes(client)
    host = assemble(settings, describe_with(client))
    await schedule_sweep(client, settings, SWEEP_HOST_WORKFLOW, settings.host)
    opening = asyncio.create_task(open_for_builds(client, host))
    showing = asyncio.create_task(_show(host, runtime)) if runtime else None
    try:
        await run_until_signalled(host_workers(client, host), settings, _readiness(client, host))
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
    host.admission.open = not is_draining(host.settings.data_dir)
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
