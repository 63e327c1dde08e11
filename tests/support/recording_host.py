"""Activities that record what the workflow asks for, and fail or hang where a test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from temporalio import activity
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Worker

from activities.contract.checkpoints import (
    DiskKey,
    RootfsCheckpoint,
    SnapshotCheckpoint,
    StoredFile,
)
from activities.contract.errors import HostDrainingError, LeaseLostError, TemplateManagerError
from activities.contract.inputs import (
    ArchiveLogInput,
    BuildImageInput,
    BuildRootfsInput,
    DeleteTemplateInput,
    DiscardUploadInput,
    FindHostInput,
    FindSnapshotInput,
    HoldHostInput,
    ImportTemplateInput,
    MoveTagsInput,
    PublishTemplateInput,
    PullImageInput,
    RunStepsInput,
    SendLayersInput,
    SnapshotVmInput,
    StartVmInput,
    UploadArtifactInput,
    UploadArtifactsInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.interface import (
    ArtifactActivities,
    AskedHostActivities,
    CheckpointActivities,
    DeletionActivities,
    DiskStepActivities,
    HostActivities,
    HostFindingActivities,
    HostReleaseActivities,
    ImageActivities,
    ImageStepActivities,
    LayerActivities,
    LogActivities,
    MicrovmActivities,
    NameActivities,
    NetworkActivities,
    RootfsActivities,
    TemplateBaseActivities,
    TenantRemovalActivities,
    UploadUndoActivities,
)
from activities.contract.names import (
    SHARED_HOST_TASK_QUEUE,
    WORKFLOW_TASK_QUEUE,
    ArtifactName,
    lease_task_queue,
    step_task_queue,
)
from activities.contract.requests import Commands
from activities.contract.results import (
    DeletedTemplate,
    DiscardedUpload,
    FoundHost,
    MovedTags,
    PublishedTemplate,
    PulledImage,
    StoredObject,
    TemplateBase,
    UploadedArtifact,
    Verification,
)
from activities.contract.scope import BuildScope, HostLease, VmRef
from activities.contract.status import LogEntry, LogLevel
from activities.contract.tenant_removal import DeleteBuildInput, FindBuildsInput, TenantBuilds
from activities.host.orphans import describe_with
from activities.host.tenant_lines import TenantLines
from activities.process.clock import utc_now
from activities.process.temporal import ErrorInterceptor, make_worker
from activities.process.tenants_file import TenantsFile
from activities.step.log_stream import LinesWithResult, give_to_result
from tests.support.example_template import pulled_image
from workflows.worker import WORKFLOWS, sandbox

MANY_SLOTS = 100


class Journal:
    """What was called, in order, by all hosts; and what is to go wrong."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arguments: list[tuple[str, Any]] = []
        self.failures: dict[str, list[TemplateManagerError]] = {}
        self.hanging: set[str] = set()
        self.started: dict[str, asyncio.Event] = {}
        self.published: PublishedTemplate | None = None
        self.next_lease = 1
        self.found_hosts: list[FoundHost] = []
        """What is found for builds that a host has refused, one after the other."""
        self.builds: set[str] = set()
        """What a tenant that is removed has."""
        self.sticky_builds: set[str] = set()
        """Those of `builds` that are found again, however often they are deleted."""

    def fail(self, name: str, *errors: TemplateManagerError) -> None:
        """Let the next calls of `name` raise these."""
        self.failures.setdefault(name, []).extend(errors)

    def hang(self, name: str) -> asyncio.Event:
        """Let `name` run until it is cancelled; the event says that it has started."""
        self.hanging.add(name)
        self.started[name] = asyncio.Event()
        return self.started[name]

    async def call(self, name: str, argument: Any) -> None:
        """Record a call, then fail or hang as told."""
        self.calls.append(name)
        self.arguments.append((name, argument))
        if self.failures.get(name):
            raise self.failures[name].pop(0)
        if name not in self.hanging:
            return
        self.started[name].set()
        try:
            while name in self.hanging:
                activity.heartbeat()
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.calls.append(f"{name} stopped")
            raise

    def of(self, *names: str) -> list[str]:
        """Return the calls of these activities, in order."""
        return [call for call in self.calls if call in names]


FILE = StoredFile(size_bytes=1 << 20, allocated_bytes=1 << 20, sha256="0" * 64)


def rootfs_checkpoint(host: str, chain: tuple[DiskKey, ...] = ()) -> RootfsCheckpoint:
    files: dict[str, StoredFile] = {ArtifactName.ROOTFS: FILE}
    return RootfsCheckpoint(fingerprint="f" * 64, host=host, files=files, chain=chain)


def snapshot_checkpoint(host: str) -> SnapshotCheckpoint:
    files: dict[str, StoredFile] = dict.fromkeys(ArtifactName, FILE)
    return SnapshotCheckpoint(fingerprint="f" * 64, host=host, files=files)


def stored(name: str) -> StoredObject:
    return StoredObject(name=name, generation=1, size_bytes=1, crc32c="AAAAAA==")


class RecordingHost(
    HostActivities,
    AskedHostActivities,
    HostReleaseActivities,
    CheckpointActivities,
    ImageActivities,
    ImageStepActivities,
    TemplateBaseActivities,
    RootfsActivities,
    DiskStepActivities,
    NetworkActivities,
    MicrovmActivities,
    LayerActivities,
    ArtifactActivities,
    UploadUndoActivities,
):
    """A host that only records. Its slot handling is that of the real contract."""

    def __init__(
        self, name: str, journal: Journal, *, whole_steps: bool = True, sends_ahead: bool = False
    ) -> None:
        """Without `whole_steps` it is of an earlier version, and without `sends_ahead`, too."""
        self.name = name
        self.sends_ahead = sends_ahead
        self.chain = (DiskKey(fingerprint="f" * 64),) if sends_ahead else ()
        self.whole_steps = whole_steps
        self.journal = journal
        self.lease: HostLease | None = None
        self.silent = asyncio.Event()
        self.released: set[int] = set()
        self.reused: SnapshotCheckpoint | None = None

    @activity.defn(name="hold_host_if_free")
    async def hold_host_if_free(self, hold: HoldHostInput, /) -> None:
        await self.journal.call("hold_host_if_free", hold)
        if self.lease is not None and self.lease.number not in self.released:
            raise HostDrainingError("the host has no free slot")
        await self._hold_build(hold)

    @activity.defn(name="hold_host")
    async def hold_host(self, hold: HoldHostInput, /) -> None:
        await self.journal.call("hold_host", hold)
        await self._hold_build(hold)

    async def _hold_build(self, hold: HoldHostInput) -> None:
        # As a real host, whose ledger forgets a lease that was given back.
        is_kept = self.lease is not None and self.lease.number not in self.released
        if hold.retaken_from is None or self.lease is None or not is_kept:
            number = self.journal.next_lease
            self.lease = HostLease(host=self.name, number=number)
            self.journal.next_lease += 1
        can = {"whole_steps": self.whole_steps, "sends_ahead": self.sends_ahead}
        self.lease = self.lease.model_copy(update=can)
        info = activity.info()
        handle = activity.client().get_workflow_handle(
            info.workflow_id or "", run_id=info.workflow_run_id
        )
        await handle.signal("lease_granted", self.lease)
        try:
            while self.lease.number not in self.released:
                if not self.silent.is_set():
                    activity.heartbeat()
                await asyncio.sleep(0.1)
            self.journal.calls.append("host released")
        except asyncio.CancelledError:
            if not self.silent.is_set():
                self.journal.calls.append("host released")
            raise

    @activity.defn(name="release_host")
    async def release_host(self, scope: BuildScope, /) -> None:
        self.released.add(scope.lease.number)

    @activity.defn(name="find_snapshot")
    async def find_snapshot(self, find: FindSnapshotInput, /) -> SnapshotCheckpoint | None:
        await self.journal.call("find_snapshot", find)
        return self.reused

    @activity.defn(name="discard_checkpoints")
    async def discard_checkpoints(self, build_id: str, /) -> None:
        await self.journal.call("discard_checkpoints", build_id)

    @activity.defn(name="pull_image")
    async def pull_image(self, pull: PullImageInput, /) -> PulledImage:
        await self._step("pull_image", pull, pull.scope)
        return pulled_image()

    @activity.defn(name="build_image")
    async def build_image(self, build: BuildImageInput, /) -> PulledImage:
        await self._step("build_image", build, build.scope)
        return pulled_image().model_copy(
            update={
                "reference": "steps@sha256:" + "c" * 64,
                "digest": "sha256:" + "c" * 64,
                "base_reference": build.base.reference_to_pull,
            }
        )

    @activity.defn(name="import_template")
    async def import_template(self, take: ImportTemplateInput, /) -> PulledImage:
        await self._step("import_template", take, take.scope)
        commands = Commands(start="base serves", ready="base answers")
        base = TemplateBase(disk=rootfs_checkpoint(self.name), commands=commands)
        return pulled_image().model_copy(update={"base": base, "tenant": take.scope.tenant})

    @activity.defn(name="build_rootfs")
    async def build_rootfs(self, build: BuildRootfsInput, /) -> RootfsCheckpoint:
        await self._step("build_rootfs", build, build.scope)
        return rootfs_checkpoint(self.name, self.chain)

    @activity.defn(name="run_steps")
    async def run_steps(self, build: RunStepsInput, /) -> RootfsCheckpoint:
        await self._step("run_steps", build, build.vm.scope)
        return rootfs_checkpoint(self.name, self.chain)

    @activity.defn(name="send_layers")
    async def send_layers(self, send: SendLayersInput, /) -> int:
        await self._step("send_layers", send, send.scope)
        return len(self.chain)

    @activity.defn(name="clean_up_rootfs")
    async def clean_up_rootfs(self, scope: BuildScope, /) -> None:
        await self.journal.call("clean_up_rootfs", scope)

    @activity.defn(name="set_up_network")
    async def set_up_network(self, vm: VmRef, /) -> None:
        await self._step(f"set_up_network {vm.purpose}", vm, vm.scope)

    @activity.defn(name="tear_down_network")
    async def tear_down_network(self, vm: VmRef, /) -> None:
        await self.journal.call(f"tear_down_network {vm.purpose}", vm)

    @activity.defn(name="start_vm")
    async def start_vm(self, start: StartVmInput, /) -> None:
        await self._step("start_vm", start, start.vm.scope)

    @activity.defn(name="wait_until_ready")
    async def wait_until_ready(self, wait: WaitUntilReadyInput, /) -> None:
        await self._step("wait_until_ready", wait, wait.vm.scope)

    @activity.defn(name="snapshot_vm")
    async def snapshot_vm(self, snapshot: SnapshotVmInput, /) -> SnapshotCheckpoint:
        await self._step("snapshot_vm", snapshot, snapshot.vm.scope)
        return snapshot_checkpoint(self.name)

    @activity.defn(name="verify_snapshot")
    async def verify_snapshot(self, verify: VerifySnapshotInput, /) -> Verification:
        await self._step("verify_snapshot", verify, verify.vm.scope)
        return Verification(resume_ms=20, load_ms=10, clock_skew_ms=-3, seconds_since_snapshot=1)

    @activity.defn(name="kill_vm")
    async def kill_vm(self, vm: VmRef, /) -> None:
        await self.journal.call(f"kill_vm {vm.purpose}", vm)

    @activity.defn(name="upload_artifact")
    async def upload_artifact(self, upload: UploadArtifactInput, /) -> UploadedArtifact:
        await self._step(f"upload_artifact {upload.name}", upload, upload.scope)
        return UploadedArtifact(
            name=upload.name,
            objects={"data": stored(upload.name)},
            size_bytes=1,
            sent_bytes=1,
            sha256="0" * 64,
        )

    @activity.defn(name="upload_artifacts")
    async def upload_artifacts(
        self, upload: UploadArtifactsInput, /
    ) -> dict[str, UploadedArtifact]:
        one = partial(UploadArtifactInput, scope=upload.scope, snapshot=upload.snapshot)
        return {name: await self.upload_artifact(one(name=name)) for name in upload.names}

    @activity.defn(name="publish_template")
    async def publish_template(self, publish: PublishTemplateInput, /) -> PublishedTemplate:
        await self._step("publish_template", publish, publish.scope)
        self.journal.published = PublishedTemplate(
            bucket="bucket",
            prefix=f"{publish.scope.build_id}/",
            metadata=stored("metadata.json"),
            artifacts=publish.uploads,
        )
        return self.journal.published

    @activity.defn(name="discard_upload")
    async def discard_upload(self, discard: DiscardUploadInput, /) -> DiscardedUpload:
        await self.journal.call(f"discard_upload keep_parts={discard.keep_parts}", discard)
        return DiscardedUpload(published=self.journal.published)

    async def _step(self, name: str, argument: Any, scope: BuildScope) -> None:
        if self.lease is None or scope.lease.number != self.lease.number:
            raise LeaseLostError(f"{name} came with lease {scope.lease.number}")
        await self.journal.call(name, argument)
        if scope.lease.whole_steps:
            give_to_result(
                [LogEntry(timestamp=utc_now(), level=LogLevel.INFO, message=f"{name} was called")]
            )


class RecordingLog(
    LogActivities,
    NameActivities,
    DeletionActivities,
    TenantRemovalActivities,
    HostFindingActivities,
):
    """The activities of the `template-manager` queue."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    @activity.defn(name="find_host")
    async def find_host(self, find: FindHostInput, /) -> FoundHost:
        await self.journal.call("find_host", find)
        return self.journal.found_hosts.pop(0) if self.journal.found_hosts else FoundHost()

    @activity.defn(name="find_builds_of_tenant")
    async def find_builds_of_tenant(self, find: FindBuildsInput, /) -> TenantBuilds:
        await self.journal.call("find_builds_of_tenant", find)
        return TenantBuilds(build_ids=tuple(self.journal.builds - set(find.without)))

    @activity.defn(name="delete_build_of_tenant")
    async def delete_build_of_tenant(self, delete: DeleteBuildInput, /) -> None:
        await self.journal.call("delete_build_of_tenant", delete)
        self.journal.builds -= {delete.build_id} - self.journal.sticky_builds

    @activity.defn(name="delete_objects_of_tenant")
    async def delete_objects_of_tenant(self, tenant: str, /) -> int:
        await self.journal.call("delete_objects_of_tenant", tenant)
        return 2

    @activity.defn(name="move_tags")
    async def move_tags(self, move: MoveTagsInput, /) -> MovedTags:
        await self.journal.call("move_tags", move)
        return MovedTags()

    @activity.defn(name="archive_log")
    async def archive_log(self, archive: ArchiveLogInput, /) -> StoredObject:
        await self.journal.call("archive_log", archive)
        return stored("logs")

    @activity.defn(name="delete_objects")
    async def delete_objects(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        await self.journal.call("delete_objects", delete)
        return DeletedTemplate(removed_objects=3, tombstone_generation=9)

    @activity.defn(name="delete_image_tag")
    async def delete_image_tag(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        await self.journal.call("delete_image_tag", delete)
        return DeletedTemplate(removed_tag=True)

    @activity.defn(name="remove_late_arrivals")
    async def remove_late_arrivals(self, deleted: DeletedTemplate, build_id: str, /) -> int:
        await self.journal.call("remove_late_arrivals", build_id)
        return 0


@asynccontextmanager
async def running_host(
    client: Client, host: RecordingHost, slots: int = MANY_SLOTS
) -> AsyncIterator[None]:
    """Run a host's three workers: shared queue, lease queue and step queue.

    Each host has a connection of its own, as a process has: one takes a queue only once.
    """
    client = await Client.connect(
        client.service_client.config.target_host, data_converter=pydantic_data_converter
    )
    async with contextlib.AsyncExitStack() as stack:
        queues: list[tuple[str, list[Callable[..., Any]]]] = [
            (SHARED_HOST_TASK_QUEUE, [host.hold_host]),
            (
                lease_task_queue(host.name),
                [host.hold_host, host.hold_host_if_free, host.release_host],
            ),
            (step_task_queue(host.name), step_methods(host)),
        ]
        for queue, methods in queues:
            most = slots if queue == SHARED_HOST_TASK_QUEUE else MANY_SLOTS
            await stack.enter_async_context(host_worker(client, queue, methods, most))
        yield


def host_worker(
    client: Client, queue: str, methods: Sequence[Callable[..., Any]], slots: int = MANY_SLOTS
) -> Worker:
    return Worker(
        client,
        task_queue=queue,
        activities=methods,
        max_concurrent_activities=slots,
        interceptors=[ErrorInterceptor(), LinesWithResult()],
        max_heartbeat_throttle_interval=timedelta(seconds=0.2),
    )


def workflow_worker(client: Client, activities: Sequence[Callable[..., object]]) -> Worker:
    """Return a worker for all workflows and the given activities."""
    return make_worker(
        client,
        WORKFLOW_TASK_QUEUE,
        activities,
        workflows=WORKFLOWS,
        workflow_runner=sandbox(),
    )


def step_methods(host: RecordingHost) -> list[Callable[..., Any]]:
    return [
        host.find_snapshot,
        host.discard_checkpoints,
        host.pull_image,
        host.build_image,
        host.import_template,
        host.build_rootfs,
        host.run_steps,
        host.send_layers,
        host.clean_up_rootfs,
        host.set_up_network,
        host.tear_down_network,
        host.start_vm,
        host.wait_until_ready,
        host.snapshot_vm,
        host.verify_snapshot,
        host.kill_vm,
        host.upload_artifact,
        host.upload_artifacts,
        host.publish_template,
    ]


@asynccontextmanager
async def running_stack(
    client: Client,
    *hosts: RecordingHost,
    tenants_file: Path | None = None,
    slots: int = MANY_SLOTS,
) -> AsyncIterator[None]:
    """Run the workflow worker and some hosts; with one slot each takes a build after the other."""
    log = RecordingLog(hosts[0].journal)
    lines = TenantLines(client, describe_with(client), TenantsFile(tenants_file))
    everywhere: list[Callable[..., Any]] = [
        log.move_tags,
        log.archive_log,
        log.delete_objects,
        log.delete_image_tag,
        log.remove_late_arrivals,
        log.find_host,
        log.find_builds_of_tenant,
        log.delete_build_of_tenant,
        log.delete_objects_of_tenant,
        hosts[0].discard_upload,
        lines.enter_line,
        lines.look_at_line,
    ]
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(workflow_worker(client, everywhere))
        for host in hosts:
            await stack.enter_async_context(running_host(client, host, slots))
        yield
