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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path

import docker
import psutil
from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import TemplateManagerError, TemporalUnavailableError
from activities.contract.inputs import SweepInput
from activities.contract.interface import BucketSweepActivities, HostSweepActivities
from activities.contract.names import UUID_PATTERN, build_workflow_id, parse_vm_name
from activities.contract.results import StoredObject, SweepReport, SweptItem
from activities.contract.units import MIB
from activities.disk import mounts
from activities.disk.data_dir import DataDir, maker_of
from activities.disk.locks import remove_lock
from activities.disk.loop_devices import detach_loop_device, loop_devices
from activities.image.containers import BUILD_LABEL, DATA_DIR_LABEL, LEASE_LABEL, remove_container
from activities.image.docker_daemon import docker_errors
from activities.image.docker_steps import STEP_REPOSITORY, TEMPLATE_REPOSITORY
from activities.image.pulled_images import PulledImages
from activities.microvm.network import (
    NETNS_DIRECTORY,
    owner_of_passing,
    remove_network,
)
from activities.microvm.vm_process import SUPERVISOR, VmProcess
from activities.process.metrics import count_sweep
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.work_directories import lease_of_work_directory, remove_work_directory
from activities.store.bucket import Bucket
from activities.store.files import KEPT_SECONDS
from activities.store.lease_numbers import LeaseObjects
from activities.store.objects import FILES, LEASES, PARTS_GLOB, ObjectKind, parse_object_name

KILL_SECONDS = 10.0
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
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store
        self._leases = leases
        self._docker = docker_client
        self._pulled = PulledImages(self._data_dir)
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
        for path in _entries(self._data_dir.vms):
            remove = VmProcess(path).remove
            yield from _of_vm("VM", path.name, _made_at(path), remove, _size(path))

    def _stray_vms(self) -> Iterator[Found]:
        """VMs whose directory is gone: their supervisor has the name as its argument."""
        for process in psutil.process_iter(["cmdline", "create_time"]):
            command = process.info["cmdline"] or []
            if str(SUPERVISOR) not in command or not _is_in(process, self._data_dir):
                continue
            name = command[command.index(str(SUPERVISOR)) + 1]
            if not self._data_dir.vm(name).exists():
                started = float(process.info["create_time"])
                yield from _of_vm("process", name, started, partial(_kill, process))

    def _networks(self) -> Iterator[Found]:
        for mark in _entries(self._data_dir.networks):
            yield from _of_vm("netns", mark.name, _made_at(mark), partial(_remove_marked, mark))
        for path in _entries(NETNS_DIRECTORY):
            owner = owner_of_passing(path.name)
            if owner is not None and not psutil.pid_exists(owner):
                yield _nobodys("netns", path.name, partial(remove_network, path.name))

    def _containers(self) -> Iterator[Found]:
        with docker_errors():
            own = f"{DATA_DIR_LABEL}={self._data_dir.root}"
            listed = self._docker.containers(all=True, filters={"label": [BUILD_LABEL, own]})
        for container in listed:
            labels, names = container["Labels"], container["Names"]
            yield Found(
                "container",
                names[0].lstrip("/") if names else container["Id"][:12],
                labels[BUILD_LABEL],
                int(labels.get(LEASE_LABEL, 0)),
                float(container["Created"]),
                partial(self._remove_container, container["Id"]),
            )

    def _loop_devices(self) -> Iterator[Found]:
        for device, backing in loop_devices():
            if self._data_dir.contains(backing):
                path = Path(backing.removesuffix(" (deleted)"))
                remove = partial(detach_loop_device, device)
                yield from _of_step(("loop device", str(device)), path, backing, remove)

    def _unfinished(self) -> Iterator[Found]:
        """Checkpoints that were never finished."""
        for step in _entries(self._data_dir.steps):
            for path in _entries(step):
                remove = partial(shutil.rmtree, path, ignore_errors=True)
                what = ("unfinished step", path.name)
                yield from _of_step(what, path, path.name, remove, _size(path))

    def _work(self) -> Iterator[Found]:
        for build in _entries(self._data_dir.work):
            for path in _entries(build):
                yield Found(
                    "work directory",
                    f"{build.name}/{path.name}",
                    build.name,
                    lease_of_work_directory(path) or 0,
                    _made_at(path),
                    partial(_unmount_and_remove, path),
                    _size(path),
                )

    def _ledger_entries(self) -> Iterator[Found]:
        for entry in self._ledger.entries():
            build_id, number = entry.build_id, entry.number
            remove = partial(self._ledger.remove, build_id, number)
            yield Found("lease", build_id, build_id, number, entry.taken_at, remove)

    def _references(self) -> Iterator[Found]:
        for build_id, path in self._store.references():
            name = f"{path.parent.parent.name[:12]} by {build_id}"
            yield _of_build("reference", name, build_id, path)

    def _logs(self) -> Iterator[Found]:
        for path in _entries(self._data_dir.logs):
            build_id = path.name.partition(".")[0]
            if re.fullmatch(UUID_PATTERN, build_id):
                yield _of_build("log", path.name, build_id, path, _size(path))

    def _locks(self) -> Iterator[Found]:
        for path in _entries(self._data_dir.locks):
            if time.time() - _made_at(path) > LOCK_SECONDS:
                yield _nobodys("lock", path.name, partial(remove_lock, path))

    async def _evictable(self, owners: Owners) -> list[Found]:
        """Checkpoints that no running build uses: the too old, and the oldest of too many."""
        kept = await asyncio.to_thread(self._store.all)
        total = sum(checkpoint.bytes for checkpoint in kept)
        limit = self._settings.checkpoint_max_mb * MIB
        oldest_allowed = time.time() - self._settings.checkpoint_max_age_hours * 3600
        evicted = []
        for checkpoint in sorted(kept, key=lambda checkpoint: checkpoint.used_at):
            if checkpoint.used_at >= oldest_allowed and total <= limit:
                break
            users = [build for build in checkpoint.users if await owners.is_open(build)]
            if users:
                continue
            total -= checkpoint.bytes
            evict = partial(self._store.evict, checkpoint.path, checkpoint.users)
            evicted.append(_nobodys("checkpoint", checkpoint.name, evict, checkpoint.bytes))
        return [*evicted, *await asyncio.to_thread(self._old_images, oldest_allowed)]

    def _old_images(self, oldest_allowed: float) -> list[Found]:
        """Images that no build has used, or that steps have made, for long.

        A build that misses one pulls or makes it again.
        """
        found = []
        for reference, _ in self._pulled.unused_since(oldest_allowed):
            remove = partial(self._remove_pulled, reference)
            found.append(_nobodys("image", reference, remove, self._size_of_image(reference)))
        with docker_errors():
            for repository in (STEP_REPOSITORY, TEMPLATE_REPOSITORY):
                for image in self._docker.images(name=repository):
                    if image["Created"] < oldest_allowed:
                        names = image["RepoTags"]
                        remove = partial(self._untag, names)
                        found.append(_nobodys("image", names[0], remove, image["Size"]))
        return found

    def _size_of_image(self, reference: str) -> int:
        with docker_errors(), contextlib.suppress(docker.errors.NotFound):
            inspected = self._docker.inspect_image(reference)  # type: ignore[no-untyped-call]
            return int(inspected["Size"])
        return 0

    def _remove_pulled(self, reference: str) -> None:
        with docker_errors():
            try:
                self._docker.remove_image(reference)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                # A container of somebody else's has it: then it is theirs from now on.
                if error.status_code != HTTPStatus.CONFLICT:
                    raise
        self._pulled.remove(reference)

    def _untag(self, names: list[str]) -> None:
        # A tag alone: Docker keeps what a container or another image needs.
        with docker_errors(), contextlib.suppress(docker.errors.NotFound):
            for name in names:
                self._docker.remove_image(name)

    def _remove_container(self, container_id: str) -> None:
        with docker_errors():
            remove_container(self._docker, container_id)


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
        found = await asyncio.to_thread(self._list)
        orphans = [thing for thing in found if await self._is_orphan(thing, owners)]
        return await asyncio.to_thread(_remove_all, orphans, sweep.dry_run)

    def _list(self) -> list[Found]:
        bucket, old = self._bucket, time.time() - KEPT_SECONDS
        # Looked at again: a server that does not know globs lists everything.
        parts = self._of_kind(ObjectKind.PART, bucket.list_dated(glob=PARTS_GLOB))
        leases = self._of_kind(ObjectKind.LEASE, bucket.list_dated(prefix=LEASES))
        files = self._of_kind(ObjectKind.FILES, bucket.list_dated(prefix=FILES))
        return [*parts, *leases, *(thing for thing in files if thing.made_at < old)]

    def _of_kind(
        self, kind: ObjectKind, listed: Iterable[tuple[StoredObject, float]]
    ) -> Iterator[Found]:
        for stored, written_at in listed:
            named = parse_object_name(stored.name)
            if named is None or named.kind is not kind:
                continue
            yield Found(
                kind,
                stored.name,
                named.build_id,
                stored.generation if kind is ObjectKind.LEASE else None,
                written_at,
                partial(self._bucket.delete_object, stored.name, stored.generation),
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


def _of_vm(
    kind: str, name: str, made_at: float, remove: Callable[[], object], size_bytes: int = 0
) -> Iterator[Found]:
    """Yield what has the name of a VM; nothing when it has another."""
    named = parse_vm_name(name)
    if named:
        yield Found(kind, name, named.build_id, named.lease_number, made_at, remove, size_bytes)


def _of_step(
    what: tuple[str, str], path: Path, text: str, remove: Callable[[], object], size_bytes: int = 0
) -> Iterator[Found]:
    """Yield what has the name of an unfinished step in `text`; nothing when it has not."""
    maker = maker_of(text)
    if maker:
        yield Found(*what, *maker, _made_at(path), remove, size_bytes)


def _of_build(kind: str, name: str, build_id: str, path: Path, size_bytes: int = 0) -> Found:
    """Return a file that belongs to a build as such, under whatever lease."""
    remove = partial(path.unlink, missing_ok=True)
    return Found(kind, name, build_id, None, _made_at(path), remove, size_bytes)


def _nobodys(kind: str, name: str, remove: Callable[[], object], size_bytes: int = 0) -> Found:
    """Return something that no build owns, whatever its age."""
    return Found(kind, name, "", None, 0.0, remove, size_bytes)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _made_at(path: Path) -> float:
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


def _is_in(process: psutil.Process, data_dir: DataDir) -> bool:
    try:
        return data_dir.contains(process.cwd())
    except (psutil.Error, OSError):
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it knows its start time, too
        process.kill()  # its VMM dies with it
        process.wait(KILL_SECONDS)


def _remove_marked(mark: Path) -> None:
    remove_network(mark.name)
    mark.unlink(missing_ok=True)


def _unmount_and_remove(directory: Path) -> None:
    for point in mounts.mounts_under(directory):
        mounts.unmount(point)
    remove_work_directory(directory)
