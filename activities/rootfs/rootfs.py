"""The root file system: an image's merged layers as an ext4, with what makes it boot.

The truth is the image's own layers as overlayfs merges them, without the layer in which Docker puts
its own mount points. Nothing of the image runs here: child processes look into its files and copy
them.
"""

from __future__ import annotations

import os
import platform
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import docker
from temporalio import activity

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint, RootfsFacts
from activities.contract.errors import (
    CheckpointLostError,
    EarlierWorkerError,
    HostDiskFullError,
    RootfsTooLargeError,
    StorageDriverError,
)
from activities.contract.inputs import BuildRootfsInput
from activities.contract.interface import RootfsActivities
from activities.contract.names import ArtifactName, Step, tenant_mark
from activities.contract.results import ImageConfig
from activities.contract.scope import BuildScope
from activities.contract.units import MIB
from activities.disk import ext4, mounts
from activities.disk.data_dir import DataDir
from activities.disk.limited_child import ChildLimits
from activities.disk.loop_devices import detach_loop_device, loop_devices_of
from activities.disk.namespaces import in_mount_namespace
from activities.disk.tree_content import BLOCK, Content, TreeLimits, measure
from activities.image.containers import remove_containers
from activities.image.docker_daemon import InspectedImage, docker_errors, find_image
from activities.process.settings import Settings
from activities.rootfs.copying import copy_tree
from activities.rootfs.guest_files import (
    agent_version,
    asked_command,
    guest_files_sha256,
    stage_image_files,
    stage_request,
)
from activities.rootfs.image_look import Look
from activities.rootfs.tree_children import TreeChildren
from activities.step.checkpoints import CheckpointStore, copy_disk, fingerprint
from activities.step.layer_disks import LayerDisks
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.work_directories import (
    lease_of_work_directory,
    remove_if_empty,
    remove_work_directory,
    work_directory,
)

# Raise it when the same inputs give another root file system than before.
PROVISIONING_VERSION = 3


HOST_RESERVE_BYTES = 64 * MIB


OUR_OWN = TreeLimits(entries=100_000, path_bytes=4000)


DIRECTORIES_ADDED = 12  # at most: those that a bare image lacks, and the files in `/etc`


@dataclass(frozen=True)
class Workplace:
    """One attempt's directory on the host, under `<data>/work/<build_id>/`."""

    directory: Path
    kept: Path
    """The directory that becomes the checkpoint."""

    @classmethod
    def of(cls, data_dir: DataDir, scope: BuildScope, attempt: int, kept: Path) -> Workplace:
        """Name an attempt's directory."""
        return cls(work_directory(data_dir, scope, "rootfs", str(attempt)), kept)

    @property
    def image(self) -> Path:
        """The new file system."""
        return self.kept / ArtifactName.ROOTFS

    @property
    def staged(self) -> Path:
        """What becomes `/.template`."""
        return self.directory / "template"

    @property
    def merged(self) -> Path:
        """Where the image's layers are mounted."""
        return self.directory / "merged"

    @property
    def target(self) -> Path:
        """Where the new file system is mounted."""
        return self.directory / "target"

    @property
    def empty(self) -> Path:
        """A layer without anything: overlayfs wants two at least."""
        return self.directory / "empty"

    @property
    def bare(self) -> Path:
        """The root of an image without any layer."""
        return self.directory / "bare"


def unused_health_check(build: BuildRootfsInput) -> list[str]:
    """Say that the image's HEALTHCHECK is no ready command, where there is none."""
    test = build.image.config.healthcheck
    if build.ready_command or len(test) < 2 or test[0] not in ("CMD", "CMD-SHELL"):
        return []
    line = test[1] if test[0] == "CMD-SHELL" else shlex.join(test[1:])
    return [f"no ready command; the image's HEALTHCHECK is not taken for one: {line}"]


def unstarted(image: ImageConfig) -> str:
    """Say that a build without a start command starts nothing, and what its image would."""
    words = [*image.entrypoint, *image.cmd]
    if not any(words):
        return "no start command, and the image has none: nothing is started in the guest"
    own = shlex.join(words)
    return f"no start command: the image's own is not started (start command `image` is: {own})"


@dataclass(frozen=True)
class Flattened:
    """What flattening an image has made."""

    size_bytes: int
    available_bytes: int
    files: int
    added: list[str]
    init_kind: str


class HostRootfsActivities(RootfsActivities):
    """Makes root file systems on this host."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        store: CheckpointStore,
        docker_client: docker.APIClient,
        layers: LayerDisks | None = None,
    ) -> None:
        """Without `layers` everything is made here."""
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store
        self._docker = docker_client
        self._layers = layers

    @activity.defn(name="build_rootfs")
    async def build_rootfs(self, build: BuildRootfsInput, /) -> RootfsCheckpoint:
        """Make `rootfs.ext4` of the image."""
        attempt = activity.info().attempt
        async with running_step(self._settings, self._ledger, build.scope, Step.ROOTFS) as step:
            return await step.in_thread(self._build, step, build, attempt)

    @activity.defn(name="clean_up_rootfs")
    async def clean_up_rootfs(self, scope: BuildScope, /) -> None:
        """Remove the containers, mounts, loop devices and half-made files of `build_rootfs`."""
        async with running_step(self._settings, self._ledger, scope, Step.ROOTFS) as step:
            await step.in_thread(self._remove_leftovers, scope)

    def _build(self, step: RunningStep, build: BuildRootfsInput, attempt: int) -> RootfsCheckpoint:
        asked_command(build)  # before anything is made: there may be none
        chain = self._chain(build)
        key = chain[-1].fingerprint
        found = self._find(step, build, key) or self._bring(step, build.scope, chain, attempt)
        if found is None:
            bare = None if build.bare else self._build(step, build.as_bare(), attempt)
            found = self._alone(step, build, key, attempt, bare)
        return found.model_copy(update={"chain": chain})

    def _chain(self, build: BuildRootfsInput) -> tuple[DiskKey, ...]:
        """Name the disk, after the bare one of the image that it is made of."""
        key = rootfs_fingerprint(self._settings, build)
        if build.bare:
            return (DiskKey(owner=build.image.tenant, fingerprint=key),)
        # Of a public image, too: what a tenant has asked for goes when the tenant does.
        owner = build.image.tenant or build.scope.tenant
        return (*self._chain(build.as_bare()), DiskKey(owner=owner, fingerprint=key))

    def _bring(
        self, step: RunningStep, scope: BuildScope, chain: Sequence[DiskKey], attempt: int
    ) -> RootfsCheckpoint | None:
        return self._layers.bring(chain, scope, attempt, step) if self._layers else None

    def _alone(
        self,
        step: RunningStep,
        build: BuildRootfsInput,
        key: str,
        attempt: int,
        bare: RootfsCheckpoint | None,
    ) -> RootfsCheckpoint:
        """Make a root file system, alone among all attempts: of the image, or of its bare disk."""
        with (
            docker_errors(),
            self._store.making(Step.ROOTFS, key, build.scope, attempt, step.check) as work,
        ):
            # Another attempt, or another build of the same image, may have just made it.
            found = self._find(step, build, key)
            if found:
                return found
            self._remove_leftovers(build.scope)
            place = Workplace.of(self._data_dir, build.scope, attempt, work)
            try:
                return self._make(step, build, key, place, bare)
            finally:
                remove_work_directory(place.directory)

    def _find(
        self, step: RunningStep, build: BuildRootfsInput, key: str
    ) -> RootfsCheckpoint | None:
        found = self._store.find(RootfsCheckpoint, key, build.scope.build_id, step.check)
        if found:
            step.log.info("root file system: an earlier build's is used again", fingerprint=key)
        return found

    def _make(
        self,
        step: RunningStep,
        build: BuildRootfsInput,
        key: str,
        place: Workplace,
        bare: RootfsCheckpoint | None,
    ) -> RootfsCheckpoint:
        for directory in (place.merged, place.target, place.empty, place.bare):
            directory.mkdir(parents=True)
        image = place.image
        agent = agent_version(self._settings, step.check)
        if bare is None:
            made = in_mount_namespace(lambda: self._flatten(step, build, key, place))
        else:
            source = self._store.require(bare, build.scope.build_id) / ArtifactName.ROOTFS
            copy_disk(source, image, step.check)
            made = in_mount_namespace(lambda: self._finish(step, build, bare, place))
        made = self._correct_size(step, build, image, made)
        step.log.debug(
            f"{'flattened' if bare is None else 'made'} into {made.size_bytes // MIB} MiB"
        )
        step.progress("checking the file system")
        ext4.check_filesystem(image, step.check, limits=self._fsck_limits)
        step.log.info(
            f"root file system: {made.size_bytes // MIB} MiB, {made.available_bytes // MIB} MiB "
            f"of them free, {made.files} files"
        )
        step.progress("keeping the file system")
        checkpoint = RootfsCheckpoint(
            fingerprint=key, host=self._settings.host, facts=_facts(agent, made)
        )
        return self._store.publish(
            place.kept, checkpoint, build.scope, names=(ArtifactName.ROOTFS,), check=step.check
        )

    def _flatten(
        self, step: RunningStep, build: BuildRootfsInput, key: str, place: Workplace
    ) -> Flattened:
        root, layers = image_layers(self._require_image(build))
        layers = layers or [str(place.bare)]
        children = TreeChildren(self._settings, build.provision_timeout_seconds, step.check)
        with mounts.merged_layers(root, [*layers, str(place.empty)], place.merged):
            step.progress("looking at the image's files")
            survey = children.survey(place.merged, build.image.config)
            content = survey.content
            self._stage(step, place.staged, survey.look)
            content.add(measure(place.staged, OUR_OWN, step.check), DIRECTORIES_ADDED)
            self._require_room(content, build)
            size_bytes = ext4.make_filesystem(
                place.image, content, build.disk_size_mb * MIB, _uuid_of(key), step.check
            )
            step.log.info(f"copying {content.files} files, {content.bytes // MIB} MiB")
            with mounts.mounted_image(place.image, place.target, "noatime"):
                (place.target / "lost+found").rmdir()  # no file of the image's
                self._copy(place, content, step)
                step.check()
                with mounts.writing_out(place.target):
                    added = children.fill(place.target, place.staged)
                mounts.sync_filesystem(place.target)
                free = os.statvfs(place.target)
        used = free.f_files - free.f_ffree
        return Flattened(
            size_bytes, free.f_bavail * free.f_bsize, used, added, survey.look.init_kind
        )

    def _stage(self, step: RunningStep, staged: Path, look: Look) -> None:
        for note in look.notes:
            step.log.info(note, source="image")
        stage_image_files(staged, self._settings, look)
        step.log.info(f"provisioned: init {look.init_kind} {look.init_path}".rstrip())

    def _finish(
        self,
        step: RunningStep,
        build: BuildRootfsInput,
        bare: RootfsCheckpoint,
        place: Workplace,
    ) -> Flattened:
        """Put what the request gives on a copy of its image's bare disk."""
        children = TreeChildren(self._settings, build.provision_timeout_seconds, step.check)
        config = build.image.config
        with mounts.mounted_image(place.image, place.target, "noatime"):
            look = children.look(place.target, config, *asked_command(build))
            place.staged.mkdir()
            for note in (*stage_request(place.staged, build, look), *unused_health_check(build)):
                step.log.info(note, source="image")
            if not build.start_command:
                step.log.info(unstarted(config))
            step.log.info(f"user of the guest: {look.user}")
            added = children.finish(place.target, place.staged, config.working_dir or "/")
            mounts.sync_filesystem(place.target)
            free = os.statvfs(place.target)
        return Flattened(
            place.image.stat().st_size,
            free.f_bavail * free.f_bsize,
            free.f_files - free.f_ffree,
            [*bare.facts.added_paths, *added],
            look.init_kind,
        )

    def _copy(self, place: Workplace, content: Content, step: RunningStep) -> None:
        seconds = self._settings.build.rootfs_timeout_seconds
        limits = ChildLimits(seconds, self._settings.tree_memory_mb)
        copy_tree(place.merged, place.target, content, place.directory, step, limits=limits)

    def _require_image(self, build: BuildRootfsInput) -> InspectedImage:
        if not build.image.image_id:
            raise EarlierWorkerError(
                f"{build.image.reference} is a template: this host runs no part of it but in VMs"
            )
        image = find_image(self._docker, build.image.image_id)
        if image is None:
            raise CheckpointLostError(
                f"image {build.image.reference} is no longer on the host", step=Step.PULL
            )
        return image

    def _require_room(self, content: Content, build: BuildRootfsInput) -> None:
        total_mb = ext4.bytes_for(content, build.disk_size_mb * MIB) // MIB
        if total_mb > self._settings.max_rootfs_mb:
            raise RootfsTooLargeError(
                f"the root file system would be {total_mb} MiB (image {content.bytes // MIB} MiB, "
                f"free space {build.disk_size_mb} MiB); the limit is "
                f"{self._settings.max_rootfs_mb} MiB"
            )
        disk = os.statvfs(self._data_dir.root)
        free_bytes = disk.f_bavail * disk.f_frsize
        needed_bytes = content.bytes + content.files * ext4.INODE_BYTES + HOST_RESERVE_BYTES
        if needed_bytes > free_bytes:
            raise HostDiskFullError(
                f"the root file system needs {needed_bytes // MIB} MiB in "
                f"{self._data_dir.root}, where {free_bytes // MIB} MiB are free"
            )

    @property
    def _fsck_limits(self) -> ChildLimits:
        return ext4.fsck_limits(self._settings.disk_check_seconds)

    def _correct_size(
        self, step: RunningStep, build: BuildRootfsInput, image: Path, made: Flattened
    ) -> Flattened:
        """Grow or shrink when the guess at what directories and attributes take was off."""
        wanted = build.disk_size_mb * MIB
        excess = made.available_bytes - wanted
        if 0 <= excess <= max(wanted // 100, MIB):
            return made
        step.log.debug(f"free space is {excess} bytes off: resizing")
        size_bytes = (made.size_bytes - excess) // BLOCK * BLOCK + MIB // 2
        ext4.check_filesystem(image, step.check, limits=self._fsck_limits)
        ext4.resize_filesystem(image, size_bytes, step.check)
        available = ext4.available_blocks(image) * BLOCK
        return replace(made, size_bytes=size_bytes, available_bytes=available)

    def _remove_leftovers(self, scope: BuildScope) -> None:
        """Remove what attempts of this lease and earlier ones have left."""
        with docker_errors():
            remove_containers(self._docker, scope)
        work = self._data_dir.work_of(scope.build_id)
        for directory in _attempts_until(work, scope.lease.number):
            for point in mounts.mounts_under(directory):
                mounts.unmount(point)
            remove_work_directory(directory)
        for device in loop_devices_of(scope.build_id):
            detach_loop_device(device)
        remove_if_empty(work)


def rootfs_fingerprint(settings: Settings, build: BuildRootfsInput) -> str:
    """Return the key of the root file system that these inputs give.

    Raises AgentMissingError when the configured agent is not on the host.
    """
    # A forced build's are its own: it must not take away what another build is working on.
    own = {"forced_by": build.scope.build_id} if build.force else {}
    # Of a public image everybody may have the bare disk; all else is its tenant's.
    tenant = build.image.tenant or ("" if build.bare else tenant_mark(build.scope.tenant))
    private = {"tenant": tenant} if tenant else {}
    bare = {"bare": True} if build.bare else {}
    return fingerprint(
        Step.ROOTFS,
        **own,
        **private,
        **bare,
        version=PROVISIONING_VERSION,
        architecture=platform.machine(),
        image=build.image.digest,
        disk_size_mb=build.disk_size_mb,
        start_command=build.start_command,
        ready_command=build.ready_command,
        env=build.env,
        guest_files=guest_files_sha256(settings),
        dns_server=settings.dns_server,
    )


def image_layers(image: InspectedImage) -> tuple[Path, list[str]]:
    """Return Docker's overlay2 directory and the image's layers in it, topmost first.

    The layers are the short links in `l/` that Docker itself mounts by; an image of no layers has
    none. Raises StorageDriverError for any other storage driver.
    """
    driver, data = image.storage.name, image.storage.data
    if driver == "overlay2" and not image.layer_count:
        return Path("/"), []
    if driver != "overlay2" or not data:
        raise StorageDriverError(f"Docker's storage driver is {driver!r}")
    below = data.get("LowerDir") or ""
    diffs = [Path(data["UpperDir"]), *(Path(part) for part in below.split(":") if part)]
    try:
        links = [f"l/{(diff.parent / 'link').read_text().strip()}" for diff in diffs]
    except FileNotFoundError as error:
        raise CheckpointLostError(f"a layer is gone: {error.filename}", step=Step.PULL) from error
    return diffs[0].parent.parent, links


def _facts(agent: str, made: Flattened) -> RootfsFacts:
    return RootfsFacts(
        size_mb=made.size_bytes // MIB,
        free_mb=made.available_bytes // MIB,
        files=made.files,
        init=made.init_kind,
        agent_version=agent,
        added_paths=tuple(made.added),
    )


def _uuid_of(key: str) -> str:
    """Return the file system's UUID: the same inputs give the same."""
    return str(uuid.UUID(key[:32]))


def _attempts_until(work: Path, lease: int) -> list[Path]:
    return [
        path
        for path in work.glob("*.*.*")
        if (number := lease_of_work_directory(path)) is not None and number <= lease
    ]
