"""KVM hosts of which only the steps' work is not real, for the fleet bench: several in a process.

Their holds, admission, ledgers, leases in the bucket, workers, heartbeats and logs are the
product's own. A step sleeps for as long as it would work, and logs a line a second.

`python temporal-dev/fleet_hosts.py FIRST COUNT SLOTS SECONDS DIRECTORY` says `ready`, takes builds
after a line on its standard input, and ends with it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from temporalio import activity

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint, StoredFile
from activities.contract.inputs import (
    BuildRootfsInput,
    FindSnapshotInput,
    PublishTemplateInput,
    PullImageInput,
    SnapshotVmInput,
    StartVmInput,
    UploadArtifactInput,
    UploadArtifactsInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.interface import (
    ArtifactActivities,
    ImageActivities,
    MicrovmActivities,
    NetworkActivities,
    RootfsActivities,
)
from activities.contract.names import ArtifactName, Step
from activities.contract.results import (
    ImageConfig,
    PublishedTemplate,
    PulledImage,
    StoredObject,
    UploadedArtifact,
    Verification,
)
from activities.contract.scope import BuildScope, VmRef
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.host.hold import KvmHostActivities
from activities.host.served import served_by
from activities.host.worker import EXTRA_STEPS, THREADS_PER_SLOT, host_workers
from activities.process.logging import configure_logging
from activities.process.settings import Settings
from activities.process.temporal import connect
from activities.step.ledger import LeaseLedger
from activities.step.running_step import running_step
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects

# Of a build's time, by what a build of a Debian image takes here. What is not named takes none.
SHARES = {
    "pull_image": 0.2,
    "build_rootfs": 0.32,
    "start_vm": 0.04,
    "wait_until_ready": 0.16,
    "snapshot_vm": 0.08,
    "verify_snapshot": 0.08,
    ArtifactName.ROOTFS: 0.04,
    ArtifactName.MEMFILE: 0.06,
    ArtifactName.SNAPFILE: 0.01,
    "publish_template": 0.01,
}
LINE_SECONDS = 1.0
HASH = "0" * 64


class SimulatedSteps(
    ImageActivities, RootfsActivities, NetworkActivities, MicrovmActivities, ArtifactActivities
):
    """The steps of a host. See `interface` for the contract; each leaves only its result."""

    def __init__(self, settings: Settings, ledger: LeaseLedger, seconds: float) -> None:
        """`seconds` is what the steps of a build take together."""
        self._host = settings.host
        self._bucket = settings.bucket
        self._settings = settings
        self._ledger = ledger
        self._seconds = seconds

    async def _work(self, scope: BuildScope, step: Step, *names: str) -> None:
        loop = asyncio.get_running_loop()
        async with running_step(self._settings, self._ledger, scope, step) as running:
            end = loop.time() + self._seconds * sum(SHARES.get(name, 0.0) for name in names)
            while (left := end - loop.time()) > 0:
                running.log.info(f"{names[0]} has {left:.0f} s to go")
                running.progress(names[0])
                await asyncio.sleep(min(LINE_SECONDS, left))
                running.check()

    @activity.defn(name="pull_image")
    async def pull_image(self, pull: PullImageInput, /) -> PulledImage:
        """Sleep."""
        await self._work(pull.scope, Step.PULL, "pull_image")
        return PulledImage(
            reference=f"{pull.image}@sha256:{HASH}",
            digest=f"sha256:{HASH}",
            image_id=f"sha256:{HASH}",
            architecture="amd64",
            size_bytes=1,
            layer_count=1,
            config=ImageConfig(),
        )

    @activity.defn(name="build_rootfs")
    async def build_rootfs(self, build: BuildRootfsInput, /) -> RootfsCheckpoint:
        """Sleep."""
        await self._work(build.scope, Step.ROOTFS, "build_rootfs")
        return RootfsCheckpoint(
            fingerprint=HASH, host=self._host, files={ArtifactName.ROOTFS: _file()}
        )

    @activity.defn(name="clean_up_rootfs")
    async def clean_up_rootfs(self, scope: BuildScope, /) -> None:
        """There is nothing to clean up."""

    @activity.defn(name="set_up_network")
    async def set_up_network(self, vm: VmRef, /) -> None:
        """Only look at the lease."""
        self._ledger.require(vm.scope)

    @activity.defn(name="tear_down_network")
    async def tear_down_network(self, vm: VmRef, /) -> None:
        """There is nothing to tear down."""

    @activity.defn(name="find_snapshot")
    async def find_snapshot(self, find: FindSnapshotInput, /) -> SnapshotCheckpoint | None:
        """Find nothing."""
        await self._work(find.scope, Step.BOOT, "find_snapshot")
        return None

    @activity.defn(name="start_vm")
    async def start_vm(self, start: StartVmInput, /) -> None:
        """Sleep."""
        await self._work(start.vm.scope, Step.BOOT, "start_vm")

    @activity.defn(name="wait_until_ready")
    async def wait_until_ready(self, wait: WaitUntilReadyInput, /) -> None:
        """Sleep."""
        await self._work(wait.vm.scope, Step.BOOT, "wait_until_ready")

    @activity.defn(name="snapshot_vm")
    async def snapshot_vm(self, snapshot: SnapshotVmInput, /) -> SnapshotCheckpoint:
        """Sleep."""
        await self._work(snapshot.vm.scope, Step.BOOT, "snapshot_vm")
        files: dict[str, StoredFile] = {name: _file() for name in ArtifactName}
        return SnapshotCheckpoint(fingerprint=HASH, host=self._host, files=files)

    @activity.defn(name="verify_snapshot")
    async def verify_snapshot(self, verify: VerifySnapshotInput, /) -> Verification:
        """Sleep."""
        await self._work(verify.vm.scope, Step.VERIFY, "verify_snapshot")
        return Verification(resume_ms=20, load_ms=10, clock_skew_ms=0, seconds_since_snapshot=1)

    @activity.defn(name="kill_vm")
    async def kill_vm(self, vm: VmRef, /) -> None:
        """There is nothing to kill."""

    @activity.defn(name="upload_artifact")
    async def upload_artifact(self, upload: UploadArtifactInput, /) -> UploadedArtifact:
        """Sleep."""
        await self._work(upload.scope, Step.UPLOAD, upload.name)
        return _uploaded(upload.name)

    @activity.defn(name="upload_artifacts")
    async def upload_artifacts(
        self, upload: UploadArtifactsInput, /
    ) -> dict[str, UploadedArtifact]:
        """Sleep."""
        await self._work(upload.scope, Step.UPLOAD, *upload.names)
        return {name: _uploaded(name) for name in upload.names}

    @activity.defn(name="publish_template")
    async def publish_template(self, publish: PublishTemplateInput, /) -> PublishedTemplate:
        """Sleep."""
        await self._work(publish.scope, Step.UPLOAD, "publish_template")
        return PublishedTemplate(
            bucket=self._bucket,
            prefix=f"{publish.scope.build_id}/",
            metadata=_stored("metadata.json"),
            artifacts=publish.uploads,
        )


def _file() -> StoredFile:
    return StoredFile(size_bytes=1 << 20, allocated_bytes=1 << 20, sha256=HASH)


def _stored(name: str) -> StoredObject:
    return StoredObject(name=name, generation=1, size_bytes=1, crc32c="AAAAAA==")


def _uploaded(name: str) -> UploadedArtifact:
    parts = ("data",) if name == ArtifactName.SNAPFILE else ("data", "header")
    objects = {part: _stored(f"{name}.{part}") for part in parts}
    return UploadedArtifact(name=name, objects=objects, size_bytes=1, sent_bytes=1, sha256=HASH)


@asynccontextmanager
async def _running_host(settings: Settings, seconds: float) -> AsyncIterator[Admission]:
    ledger = LeaseLedger(DataDir(settings.data_dir))
    admission = Admission(ledger, settings.host_slots, Room((), 0))
    leases = LeaseObjects(Bucket(settings.bucket))
    hold = KvmHostActivities(settings.host, ledger, leases, admission)
    steps = served_by(SimulatedSteps(settings, ledger, seconds))
    # A connection for each, as a process has: one takes a queue only once.
    client = await connect(f"host@{settings.host}")
    async with AsyncExitStack() as stack:
        for worker in host_workers(client, settings, admission, hold, steps):
            await stack.enter_async_context(worker)
        yield admission


async def serve(first: int, count: int, slots: int, seconds: float, directory: Path) -> None:
    """Run the hosts `first` to `first + count - 1` until standard input ends."""
    threads = ThreadPoolExecutor(count * slots * THREADS_PER_SLOT + EXTRA_STEPS)
    asyncio.get_running_loop().set_default_executor(threads)
    async with AsyncExitStack() as stack:
        hosts = []
        for number in range(first, first + count):
            name = f"host-{number}"
            settings = Settings(host=name, host_slots=slots, data_dir=directory / name)
            hosts.append(await stack.enter_async_context(_running_host(settings, seconds)))
        print("ready", flush=True)
        if await asyncio.to_thread(sys.stdin.readline):
            for admission in hosts:
                admission.open = True
            await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Run the hosts that the arguments name."""
    first, count, slots, seconds, directory = sys.argv[1:]
    configure_logging(Settings(log_level="WARNING"), "host")
    asyncio.run(serve(int(first), int(count), int(slots), float(seconds), Path(directory)))


if __name__ == "__main__":
    main()
