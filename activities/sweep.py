"""Finding and removing what no live build owns: on this host, and in the bucket.

A thing is owned when its build's workflow is open and the lease number in its name or label is the
generation of the build's lease object, whoever holds it. Things are listed first and their owners
asked for afterwards, so that what a build makes meanwhile is never taken for an orphan. When
Temporal or the bucket cannot be asked, nothing is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker
import psutil
from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities import mounts
from activities.bucket import Bucket
from activities.build_log import LOG_DIRECTORY
from activities.checkpoints import CheckpointStore, KeptCheckpoint
from activities.docker_daemon import docker_errors
from activities.errors import TemplateManagerError, TemporalUnavailableError
from activities.image_files import FILES
from activities.image_steps import STEP_REPOSITORY, TEMPLATE_REPOSITORY
from activities.interface import BucketSweepActivities, HostSweepActivities
from activities.lease_objects import LEASES, LeaseObjects
from activities.leases import LeaseLedger
from activities.locks import remove_lock
from activities.metrics import count_sweep
from activities.models import StoredObject, SweepInput, SweepReport, SweptItem, build_workflow_id
from activities.network import NETNS_DIRECTORY, network_marks, remove_network
from activities.provisioning import BUILD_LABEL, DATA_DIR_LABEL, LEASE_LABEL, remove_container
from activities.settings import Settings
from activities.vm_process import SUPERVISOR, VmProcess

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VM_NAME = re.compile(rf"tm-(?P<build_id>{UUID})-(?P<number>\d+)-[a-z]+")
RUN_NAME = re.compile(r"tm-run-(?P<pid>\d+)-[0-9a-f]+")
WORK_NAME = re.compile(rf"\.tmp\.(?P<build_id>{UUID})\.(?P<number>\d+)\.")
PARTS = "*/.parts/**"
PARTS_NAME = "/.parts/"
KILL_SECONDS = 10.0
# What COPY steps have taken: a build that is retried later starts with the command line again.
FILES_SECONDS = 30 * 24 * 3600.0
LOCK_SECONDS = 24 * 3600.0

Describe = Callable[[str], Awaitable[WorkflowExecutionStatus | None]]


def describe_with(client: Client) -> Describe:
    """Return a function that tells the state of a build's workflow; None when it is unknown.

    It raises TemporalUnavailableError when Temporal does not tell.
    """

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        handle = client.get_workflow_handle(build_workflow_id(build_id))
        try:
            return (await handle.describe()).status
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise TemporalUnavailableError(
                f"Temporal does not tell of build {build_id}: {error.message}"
            ) from error

    return describe


class Owners:
    """Answers, once per build, whether something is a live build's."""

    def __init__(self, describe: Describe, leases: LeaseObjects) -> None:
        self._describe = describe
        self._leases = leases
        self._states: dict[str, WorkflowExecutionStatus | None] = {}
        self._numbers: dict[str, int | None] = {}

    async def state(self, build_id: str) -> WorkflowExecutionStatus | None:
        """Return the state of the build's workflow; None when Temporal does not know it."""
        if build_id not in self._states:
            self._states[build_id] = await self._describe(build_id)
        return self._states[build_id]

    async def is_open(self, build_id: str) -> bool:
        """Whether the build's workflow is running."""
        return await self.state(build_id) is WorkflowExecutionStatus.RUNNING

    async def can_be_retried(self, build_id: str) -> bool:
        """Whether the build has failed and Temporal still knows it."""
        state = await self.state(build_id)
        return state is not None and state not in (
            WorkflowExecutionStatus.COMPLETED,
            WorkflowExecutionStatus.CANCELED,
        )

    async def owns(self, build_id: str, number: int) -> bool:
        """Whether a live build owns what was made under that lease number."""
        if not await self.is_open(build_id):
            return False
        if build_id not in self._numbers:
            self._numbers[build_id] = await asyncio.to_thread(self._leases.current, build_id)
        return self._numbers[build_id] == number


@dataclass
class Found:
    """Something on this host that may be an orphan, and how to remove it."""

    kind: str
    name: str
    build_id: str
    number: int | None
    """The lease number it was made under; None for what belongs to the build as such."""
    made_at: float
    """Wall clock, seconds."""
    remove: Callable[[], object] = field(repr=False)
    bytes: int = 0

    def item(self, error: str = "") -> SweptItem:
        """Return what a report says of it."""
        return SweptItem(
            kind=self.kind, name=self.name, build_id=self.build_id, bytes=self.bytes, error=error
        )


class HostSweep(HostSweepActivities):
    """Sweeps this host. See `interface` for the contract."""

    def __init__(  # noqa: PLR0917 # what a host has, in the order in which it is assembled
        self,
        settings: Settings,
        ledger: LeaseLedger,
        store: CheckpointStore,
        leases: LeaseObjects,
        docker_client: docker.APIClient,
        describe: Describe,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._leases = leases
        self._docker = docker_client
        self._describe = describe
        self._lock = asyncio.Lock()

    @activity.defn(name="sweep_host")
    async def sweep_host(self, sweep: SweepInput, /) -> SweepReport:
        """Remove what no live build owns, then evict checkpoints that are old or too many."""
        report = await self.sweep(sweep)
        count_sweep(activity.metric_meter(), report)
        return report

    async def sweep(self, sweep: SweepInput) -> SweepReport:
        """Find orphans and, unless it is a dry run, remove them.

        Raises DockerUnavailableError, StorageUnavailableError and TemporalUnavailableError; then
        nothing has been removed.
        """
        async with self._lock:
            found = await asyncio.to_thread(self._list)
            owners = Owners(self._describe, self._leases)
            orphans = [thing for thing in found if await self._is_orphan(thing, owners)]
            orphans += await self._evictable(owners)
            return await asyncio.to_thread(_remove_all, orphans, sweep.dry_run)

    async def _is_orphan(self, thing: Found, owners: Owners) -> bool:
        if time.time() - thing.made_at < 2 * self._settings.build.lease_grace_seconds:
            return False
        if not thing.build_id:
            return True
        if thing.number is None:
            return not await owners.can_be_retried(thing.build_id)
        return not await owners.owns(thing.build_id, thing.number)

    def _list(self) -> list[Found]:
        # The processes come first: a VM's directory and netns go only when it is dead.
        return [
            *self._vms(),
            *self._stray_vms(),
            *self._networks(),
            *self._containers(),
            *self._loop_devices(),
            *self._unfinished(),
            *self._work(),
            *self._ledger_entries(),
            *self._references(),
            *self._logs(),
            *self._locks(),
        ]

    def _vms(self) -> Iterator[Found]:
        for path in _entries(self._settings.data_dir / "vms"):
            named = VM_NAME.fullmatch(path.name)
            if named:
                process = VmProcess(path.parent, path.name)
                yield _found(("VM", path.name), named, _age_of(path), process.remove, _size(path))

    def _stray_vms(self) -> Iterator[Found]:
        """VMs whose directory is gone: their supervisor has the name as its argument."""
        for process in psutil.process_iter(["cmdline", "create_time"]):
            command = process.info["cmdline"] or []
            if str(SUPERVISOR) not in command or not _is_in(process, self._settings.data_dir):
                continue
            name = command[command.index(str(SUPERVISOR)) + 1]
            named = VM_NAME.fullmatch(name)
            if named and not (self._settings.data_dir / "vms" / name).exists():
                started = float(process.info["create_time"])
                yield _found(("process", name), named, started, _killer(process))

    def _networks(self) -> Iterator[Found]:
        for mark in _entries(network_marks(self._settings.data_dir)):
            named = VM_NAME.fullmatch(mark.name)

            def remove(mark: Path = mark) -> None:
                remove_network(mark.name)
                mark.unlink(missing_ok=True)

            if named:
                yield _found(("netns", mark.name), named, _age_of(mark), remove)
        for path in _entries(NETNS_DIRECTORY):
            run = RUN_NAME.fullmatch(path.name)
            if run and not psutil.pid_exists(int(run["pid"])):
                yield Found("netns", path.name, "", -1, 0.0, _remover(path.name))

    def _containers(self) -> Iterator[Found]:
        with docker_errors():
            own = f"{DATA_DIR_LABEL}={self._settings.data_dir}"
            listed = self._docker.containers(all=True, filters={"label": [BUILD_LABEL, own]})
        for container in listed:
            labels = container["Labels"]
            identity = container["Id"]

            def remove(identity: str = identity) -> None:
                with docker_errors():
                    remove_container(self._docker, identity)

            yield Found(
                "container",
                container["Names"][0].lstrip("/") if container["Names"] else identity[:12],
                labels[BUILD_LABEL],
                int(labels.get(LEASE_LABEL, 0)),
                float(container["Created"]),
                remove,
            )

    def _loop_devices(self) -> Iterator[Found]:
        for device, backing in mounts.loop_devices():
            named = WORK_NAME.search(backing)
            if named and backing.startswith(str(self._settings.data_dir)):

                def detach(device: Path = device) -> None:
                    mounts.detach_loop_device(device)

                path = Path(backing.removesuffix(" (deleted)"))
                yield _found(("loop device", str(device)), named, _age_of(path), detach)

    def _unfinished(self) -> Iterator[Found]:
        """Checkpoints that were never finished."""
        for step in _entries(self._settings.data_dir / "steps"):
            for path in _entries(step):
                named = WORK_NAME.search(f"{path.name}.")
                if named:
                    yield _found(
                        ("unfinished step", path.name),
                        named,
                        _age_of(path),
                        _tree_remover(path),
                        _size(path),
                    )

    def _work(self) -> Iterator[Found]:
        for build in _entries(self._settings.data_dir / "work"):
            for path in _entries(build):
                number = path.name.split(".")[1] if path.name.count(".") == 2 else "0"

                def remove(path: Path = path) -> None:
                    for point in mounts.mounts_under(path):
                        mounts.unmount(point)
                    shutil.rmtree(path, ignore_errors=True)
                    _remove_if_empty(path.parent)

                yield Found(
                    "work directory",
                    f"{build.name}/{path.name}",
                    build.name,
                    int(number) if number.isdigit() else 0,
                    _age_of(path),
                    remove,
                    _size(path),
                )

    def _ledger_entries(self) -> Iterator[Found]:
        for entry in self._ledger.entries():

            def remove(build_id: str = entry.build_id, number: int = entry.number) -> None:
                self._ledger.remove(build_id, number)

            yield Found(
                "lease", entry.build_id, entry.build_id, entry.number, entry.taken_at, remove
            )

    def _references(self) -> Iterator[Found]:
        for build_id, path in self._store.references():

            def remove(path: Path = path) -> None:
                path.unlink(missing_ok=True)

            name = f"{path.parent.parent.name[:12]} by {build_id}"
            yield Found("reference", name, build_id, None, _age_of(path), remove)

    def _logs(self) -> Iterator[Found]:
        for path in _entries(self._settings.data_dir / LOG_DIRECTORY):
            build_id = path.name.partition(".")[0]

            def remove(path: Path = path) -> None:
                path.unlink(missing_ok=True)

            if re.fullmatch(UUID, build_id):
                yield Found("log", path.name, build_id, None, _age_of(path), remove, _size(path))

    def _locks(self) -> Iterator[Found]:
        for path in _entries(self._settings.data_dir / "locks"):

            def remove(path: Path = path) -> None:
                remove_lock(path)

            if time.time() - _age_of(path) > LOCK_SECONDS:
                yield Found("lock", path.name, "", -1, 0.0, remove)

    async def _evictable(self, owners: Owners) -> list[Found]:
        """Checkpoints that no running build uses: the too old, and the oldest of too many."""
        kept = await asyncio.to_thread(self._store.all)
        total = sum(checkpoint.bytes for checkpoint in kept)
        limit = self._settings.checkpoint_max_mb * 1024 * 1024
        oldest_allowed = time.time() - self._settings.checkpoint_max_age_hours * 3600
        evicted = []
        for checkpoint in sorted(kept, key=lambda checkpoint: checkpoint.used_at):
            if checkpoint.used_at >= oldest_allowed and total <= limit:
                break
            users = [build for build in checkpoint.users if await owners.is_open(build)]
            if users:
                continue
            total -= checkpoint.bytes

            def evict(kept: KeptCheckpoint = checkpoint) -> None:
                self._store.evict(kept.path, kept.users)

            evicted.append(
                Found("checkpoint", checkpoint.name, "", -1, 0.0, evict, checkpoint.bytes)
            )
        return [*evicted, *await asyncio.to_thread(self._old_images, oldest_allowed)]

    def _old_images(self, oldest_allowed: float) -> list[Found]:
        """Images that steps have made long ago; a build that misses one makes it again."""
        found = []
        with docker_errors():
            for repository in (STEP_REPOSITORY, TEMPLATE_REPOSITORY):
                for image in self._docker.images(name=repository):
                    if image["Created"] >= oldest_allowed:
                        continue

                    def remove(names: list[str] = image["RepoTags"]) -> None:
                        # A tag alone: Docker keeps what a container or another image needs.
                        with docker_errors(), contextlib.suppress(docker.errors.NotFound):
                            for name in names:
                                self._docker.remove_image(name)

                    found.append(
                        Found("image", image["RepoTags"][0], "", -1, 0.0, remove, image["Size"])
                    )
        return found


class BucketSweep(BucketSweepActivities):
    """Sweeps the bucket. See `interface` for the contract."""

    def __init__(self, bucket: Bucket, describe: Describe, *, late_arrival_seconds: float) -> None:
        """`late_arrival_seconds` is how long a host without its lease can still write."""
        self._late_arrival_seconds = late_arrival_seconds
        self._bucket = bucket
        self._describe = describe

    @activity.defn(name="sweep_bucket")
    async def sweep_bucket(self, sweep: SweepInput, /) -> SweepReport:
        """Remove parts and leases of builds that can no longer use them."""
        owners = Owners(self._describe, LeaseObjects(self._bucket))
        listed = await asyncio.to_thread(self._list)
        found = [self._found(stored, written_at) for stored, written_at in listed]
        orphans = [thing for thing in found if await self._is_orphan(thing, owners)]
        return await asyncio.to_thread(_remove_all, orphans, sweep.dry_run)

    def _list(self) -> list[tuple[StoredObject, float]]:
        # Looked at again: a server that does not know globs lists everything.
        parts = [one for one in self._bucket.list_dated(glob=PARTS) if PARTS_NAME in one[0].name]
        old = time.time() - FILES_SECONDS
        files = [one for one in self._bucket.list_dated(prefix=FILES) if one[1] < old]
        return [*parts, *self._bucket.list_dated(prefix=LEASES), *files]

    def _found(self, stored: StoredObject, written_at: float) -> Found:
        if stored.name.startswith(FILES):
            return Found(
                "files", stored.name, "", -1, 0.0, self._remover(stored), stored.size_bytes
            )
        is_lease = stored.name.startswith(LEASES)
        build_id = stored.name.removeprefix(LEASES) if is_lease else stored.name.split("/")[0]
        return Found(
            "lease object" if is_lease else "part",
            stored.name,
            build_id,
            stored.generation if is_lease else None,
            written_at,
            self._remover(stored),
            stored.size_bytes,
        )

    async def _is_orphan(self, thing: Found, owners: Owners) -> bool:
        if time.time() - thing.made_at < self._late_arrival_seconds:
            return False
        if not thing.build_id:
            return True
        if thing.number is None:
            return not await owners.can_be_retried(thing.build_id)
        return not await owners.is_open(thing.build_id)

    def _remover(self, stored: StoredObject) -> Callable[[], object]:
        return lambda: self._bucket.delete_object(stored.name, stored.generation)


def _remove_all(orphans: list[Found], dry_run: bool) -> SweepReport:
    items = []
    for thing in orphans:
        error = ""
        if not dry_run:
            try:
                thing.remove()
            except (OSError, psutil.Error, TemplateManagerError) as failure:
                error = str(failure)
        items.append(thing.item(error))
    return SweepReport(items=tuple(items), dry_run=dry_run)


def _found(
    what: tuple[str, str],
    named: re.Match[str],
    made_at: float,
    remove: Callable[[], object],
    size_bytes: int = 0,
) -> Found:
    kind, name = what
    return Found(kind, name, named["build_id"], int(named["number"]), made_at, remove, size_bytes)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _age_of(path: Path) -> float:
    """Return when it was made or last changed; now, if it has just gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _size(path: Path) -> int:
    total = 0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            total += entry.lstat().st_blocks * 512
        except OSError:
            continue
    return total


def _is_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.cwd().startswith(str(directory))
    except (psutil.Error, OSError):
        return False


def _killer(process: psutil.Process) -> Callable[[], None]:
    def kill() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it knows its start time, too
            process.kill()  # its VMM dies with it
            process.wait(KILL_SECONDS)

    return kill


def _remover(name: str) -> Callable[[], None]:
    return lambda: remove_network(name)


def _tree_remover(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return
