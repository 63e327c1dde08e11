"""Checkpoints: what a finished step left on this host. They are also the cache.

`<data>/steps/<step>/<fingerprint>/` holds the files, `manifest.json` (a `Checkpoint`) and
`refs/<build_id>` for each build that uses it. It appears by rename after fsync, so it exists whole
or not at all. The fingerprint is a SHA-256 over the step's inputs. What is kept of a failed step is
beside them, in `failed`, with `step.json` (a `FailedStep`) in the place of a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from activities.contract.checkpoints import Checkpoint, StoredFile
from activities.contract.errors import CheckpointLostError, HostDiskFullError
from activities.contract.model import Model
from activities.contract.names import ArtifactName, HostName, Step
from activities.contract.scope import BuildScope, VmShape
from activities.disk.data_dir import DataDir, is_made_by, maker_of
from activities.disk.leftovers import Leftover, disk_bytes, entries, made_at, renamed_at
from activities.disk.locks import is_held, locked
from activities.disk.sparse_files import allocated_bytes, copy_private, sha256_of, sync_directory

MANIFEST = "manifest.json"
FAILED_STEP = "step.json"
REFERENCES = "refs"
CONDEMNED = "unusable"
EVICTED = ".evicted"
FINGERPRINT = re.compile("[0-9a-f]{64}")
C = TypeVar("C", bound=Checkpoint)


class FailedStep(Model):
    """Which step has left a disk that is kept to look at, and what it was given."""

    what: str
    """As users read it, and how it ended."""
    user: str
    working_dir: str
    variables: dict[str, str]
    """Without secret ones."""
    shape: VmShape


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint on this host, as the sweep sees it."""

    path: Path
    bytes: int
    """What it takes on the disk."""
    used_at: float
    """When a build last made or found it; wall clock, seconds."""
    users: tuple[str, ...]
    """Ids of the builds that refer to it."""

    @property
    def name(self) -> str:
        """`<step>/<fingerprint>`."""
        return f"{self.path.parent.name}/{self.path.name}"


def copy_disk(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy the disk of a checkpoint, to be changed. Raises HostDiskFullError."""
    try:
        copy_private(source, target, check)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise HostDiskFullError(
            f"cannot copy {source.name} ({source.stat().st_size} bytes, {free} free): {error}"
        ) from error


def fingerprint(step: Step, **inputs: object) -> str:
    """Return the key of a step's result: SHA-256 of its inputs as canonical JSON."""
    text = json.dumps({"step": step, **inputs}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class CheckpointStore:
    """The checkpoints of one host."""

    def __init__(self, data_dir: DataDir, host: HostName) -> None:
        self._data_dir = data_dir
        self._host = host

    def path(self, step: Step, key: str) -> Path:
        """Return the directory of a checkpoint."""
        return self._data_dir.checkpoint(step, key)

    def file(self, checkpoint: Checkpoint, name: ArtifactName) -> Path:
        """Return the path of one of its files."""
        return self.path(checkpoint.step, checkpoint.fingerprint) / name

    def find(self, kind: type[C], key: str, build_id: str, check: Callable[[], None]) -> C | None:
        """Return the checkpoint if it is there and every byte is right, and take a reference.

        A condemned one is not found. A damaged one is removed, so that it is made again. Blocking:
        it hashes the files.
        """
        manifest, directory = self._taken(kind, key, build_id), self.path(kind.STEP, key)
        if manifest is None:
            return None
        if all(self._is_whole(directory / n, f, check) for n, f in manifest.files.items()):
            os.utime(directory)
            return manifest.model_copy(update={"reused": True})
        shutil.rmtree(directory, ignore_errors=True)
        return None

    def look(self, kind: type[C], key: str, build_id: str) -> C | None:
        """Return the checkpoint if it is there, and take a reference; whoever reads it hashes it.

        As `require`, it looks at sizes and times only.
        """
        manifest, directory = self._taken(kind, key, build_id), self.path(kind.STEP, key)
        if manifest is None:
            return None
        if all(_looks_whole(directory / n, f) for n, f in manifest.files.items()):
            return manifest
        return None

    def _taken(self, kind: type[C], key: str, build_id: str) -> C | None:
        manifest = self._manifest(kind, key)
        if manifest is None or not self._take(self.path(kind.STEP, key), build_id):
            return None
        return manifest

    def _manifest(self, kind: type[C], key: str) -> C | None:
        directory = self.path(kind.STEP, key)
        if (directory / CONDEMNED).exists():
            return None
        try:
            return kind.model_validate_json((directory / MANIFEST).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def condemn(self, checkpoint: Checkpoint) -> None:
        """Let a checkpoint that is whole, but of no use, not be found again."""
        (self.path(checkpoint.step, checkpoint.fingerprint) / CONDEMNED).touch()

    def require(self, checkpoint: Checkpoint, build_id: str) -> Path:
        """Return the directory of what an earlier step left.

        Looks at sizes and times only (a found checkpoint has been hashed). Raises
        CheckpointLostError naming the step to go back to when anything is not as it was, or when
        it has been condemned since.
        """
        directory = self.path(checkpoint.step, checkpoint.fingerprint)
        if checkpoint.host != self._host:
            raise CheckpointLostError(
                f"the checkpoint of {checkpoint.step} is on host {checkpoint.host}",
                step=checkpoint.step,
            )
        if (directory / CONDEMNED).exists():
            raise CheckpointLostError(
                f"what {checkpoint.step} left was found to be of no use", step=checkpoint.step
            )
        for name, expected in checkpoint.files.items():
            if not _looks_whole(directory / name, expected):
                raise CheckpointLostError(
                    f"{name} of {checkpoint.step} is gone or damaged", step=checkpoint.step
                )
        if not self._take(directory, build_id):
            raise CheckpointLostError(
                f"what {checkpoint.step} left has just been evicted", step=checkpoint.step
            )
        return directory

    def is_there(self, kind: type[C], key: str) -> bool:
        """Whether there is such a checkpoint; nobody has looked at its files."""
        return self._manifest(kind, key) is not None

    def is_being_made(self, step: Step, key: str) -> bool:
        """Whether somebody works on a checkpoint, or takes it from the bucket."""
        return is_held(self._lock(step, key))

    def _lock(self, step: Step, key: str) -> Path:
        return self._data_dir.lock(f"{step}.{key}")

    @contextmanager
    def making(
        self, step: Step, key: str, scope: BuildScope, attempt: int, check: Callable[[], None]
    ) -> Iterator[Path]:
        """Work on a checkpoint: yields a directory of its own, alone among all attempts.

        Waits for another attempt at the same key (of this or another build). The directory is
        removed at the end unless `publish` has renamed it.
        """
        with locked(self._lock(step, key), check):
            work = self._data_dir.unfinished_checkpoint(step, key, scope, attempt)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def publish(
        self,
        work: Path,
        made: C,
        scope: BuildScope,
        *,
        names: Sequence[ArtifactName],
        check: Callable[[], None],
        hashes: Mapping[ArtifactName, str] | None = None,
    ) -> C:
        """Make the files of `work` those of the checkpoint `made`: hash, fsync, rename.

        Returns it with them. `hashes` are those already known (hex SHA-256). `check` is the last
        look at the fence. Replaces an older checkpoint of the same key (a forced build).
        """
        known = hashes or {}
        files = {name: _describe(work / name, check, known.get(name)) for name in names}
        checkpoint = made.model_copy(update={"files": files})
        self._reference(work, scope.build_id)
        with (work / MANIFEST).open("w") as manifest:
            manifest.write(checkpoint.model_dump_json(indent=2))
            manifest.flush()
            os.fsync(manifest.fileno())
        sync_directory(work)
        check()
        self._move_in(work, self.path(made.step, made.fingerprint))
        return checkpoint

    def keep_failed(self, disk: Path, failed: FailedStep, scope: BuildScope) -> None:
        """Keep the disk of a step that has failed, in the place of an earlier one of its build.

        It is evicted as a checkpoint is, and goes when its build is released. The file is moved.
        """
        work = self._data_dir.unfinished_failed_step(scope)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        disk.rename(work / ArtifactName.ROOTFS)
        (work / ArtifactName.ROOTFS).chmod(0o600)
        (work / FAILED_STEP).write_text(failed.model_dump_json(indent=2))
        self._reference(work, scope.build_id)
        self._move_in(work, self._data_dir.failed_step(scope.build_id))

    def failed(self, build_id: str) -> tuple[Path, FailedStep] | None:
        """Return the disk of a build's failed step, and which that was; None if it is not kept."""
        directory = self._data_dir.failed_step(build_id)
        try:
            failed = FailedStep.model_validate_json((directory / FAILED_STEP).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return directory / ArtifactName.ROOTFS, failed

    def forget_failed(self, build_id: str) -> None:
        """Remove what is kept of a failed step."""
        shutil.rmtree(self._data_dir.failed_step(build_id), ignore_errors=True)

    def release(self, build_id: str) -> None:
        """Drop the build's references, its failed step and its unfinished work."""
        self.forget_failed(build_id)
        for entry in self._in_steps():
            if is_made_by(build_id, entry.name):
                shutil.rmtree(entry, ignore_errors=True)
            (entry / REFERENCES / build_id).unlink(missing_ok=True)

    def all(self) -> list[KeptCheckpoint]:
        """Return all finished checkpoints."""
        return [kept for path in self._finished() if (kept := _look_at(path)) is not None]

    def unfinished(self) -> Iterator[Leftover]:
        """Yield what is, or will never be, made a checkpoint of; and half-done evictions."""
        for path in self._in_steps():
            remove = partial(shutil.rmtree, path, ignore_errors=True)
            if maker := maker_of(path.name):
                size_bytes = disk_bytes(path)
                yield Leftover(
                    "unfinished step", path.name, remove, *maker, made_at(path), size_bytes
                )
            elif path.name.endswith(EVICTED):
                made, size_bytes = renamed_at(path), disk_bytes(path)
                yield Leftover("checkpoint", path.name, remove, made_at=made, bytes=size_bytes)

    def references(self) -> Iterator[Leftover]:
        """Yield the builds' references to checkpoints."""
        for path in (path for kept in self._finished() for path in (kept / REFERENCES).glob("*")):
            name = f"{path.parent.parent.name[:12]} by {path.name}"
            remove = partial(path.unlink, missing_ok=True)
            yield Leftover("reference", name, remove, path.name, made_at=made_at(path))

    def evictable(
        self,
        kept: Sequence[KeptCheckpoint],
        running: Collection[str],
        *,
        max_bytes: int,
        unused_since: float,
    ) -> Iterator[Leftover]:
        """Yield those of `kept` that are too old, and the oldest of too many.

        One that a build of `running` uses stays. `unused_since` is wall clock seconds.
        """
        total = sum(checkpoint.bytes for checkpoint in kept)
        for checkpoint in sorted(kept, key=lambda checkpoint: checkpoint.used_at):
            if checkpoint.used_at >= unused_since and total <= max_bytes:
                return
            if not set(checkpoint.users).isdisjoint(running):
                continue
            total -= checkpoint.bytes
            evict = partial(self.evict, checkpoint.path, checkpoint.users)
            yield Leftover("checkpoint", checkpoint.name, evict, bytes=checkpoint.bytes)

    def evict(self, path: Path, users: Collection[str]) -> bool:
        """Remove a checkpoint, unless a build that is not of `users` has come to use it."""
        trash = path.with_name(f"{path.name}{EVICTED}")
        shutil.rmtree(trash, ignore_errors=True)
        try:
            path.rename(trash)
        except FileNotFoundError:
            return True
        # Looked at after the rename: a build that comes now does not find it and makes it again.
        if {entry.name for entry in (trash / REFERENCES).glob("*")} - set(users):
            with contextlib.suppress(OSError):
                trash.rename(path)
                return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _finished(self) -> list[Path]:
        return [path for path in self._in_steps() if FINGERPRINT.fullmatch(path.name)]

    def _in_steps(self) -> list[Path]:
        return [path for step in entries(self._data_dir.steps) for path in entries(step)]

    def _move_in(self, work: Path, target: Path) -> None:
        old = target.with_name(f"{work.name}.old")
        refs: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            refs = [path.name for path in (target / REFERENCES).iterdir()]
            target.rename(old)
        for build_id in refs:
            self._reference(work, build_id)
        work.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _take(self, directory: Path, build_id: str) -> bool:
        """Take a reference to a checkpoint; False when it is being evicted at this moment."""
        try:
            self._reference(directory, build_id)
        except FileNotFoundError:
            return False
        return True

    @staticmethod
    def _reference(directory: Path, build_id: str) -> None:
        (directory / REFERENCES).mkdir(exist_ok=True)
        (directory / REFERENCES / build_id).touch()

    @staticmethod
    def _is_whole(path: Path, expected: StoredFile, check: Callable[[], None]) -> bool:
        return _looks_whole(path, expected) and sha256_of(path, check) == expected.sha256


def _look_at(path: Path) -> KeptCheckpoint | None:
    try:
        size_bytes = sum(allocated_bytes(entry) for entry in path.iterdir() if entry.is_file())
        users = tuple(entry.name for entry in (path / REFERENCES).glob("*"))
        used_at = path.stat().st_mtime
    except FileNotFoundError:  # it has just gone
        return None
    return KeptCheckpoint(path, size_bytes, used_at, users)


def _looks_whole(path: Path, expected: StoredFile) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return stat.st_size == expected.size_bytes and stat.st_mtime_ns == expected.mtime_ns


def _describe(path: Path, check: Callable[[], None], known_sha256: str | None) -> StoredFile:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    stat = path.stat()
    return StoredFile(
        size_bytes=stat.st_size,
        allocated_bytes=allocated_bytes(path),
        sha256=known_sha256 or sha256_of(path, check),
        mtime_ns=stat.st_mtime_ns,
    )
