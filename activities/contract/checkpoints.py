"""What steps leave on a host: files, and the facts about them. They are also the cache."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from activities.contract.model import Model
from activities.contract.names import ArtifactName, Fingerprint, HostName, Step


class StoredFile(Model):
    """One file of a checkpoint. `sha256` is of the whole content, holes read as zeros."""

    size_bytes: int
    allocated_bytes: int
    sha256: str
    mtime_ns: int = 0


def _from_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(_from_json),
    PlainSerializer(json.dumps, return_type=str),
]
"""The persisted form is a JSON list in a string."""

YesNo = Annotated[bool, PlainSerializer(int, return_type=int)]
"""The persisted form is 1 or 0."""


class _Facts(Model):
    """Base of facts. The persisted form has those that were told; the others are as if empty."""

    @model_serializer(mode="wrap")
    def _to_persisted(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        told = self.model_fields_set
        return {name: value for name, value in dump(self).items() if name in told}


class RootfsFacts(_Facts):
    """How a root file system came out."""

    size_mb: int = 0
    free_mb: int = 0
    """Of `size_mb`."""
    files: int = 0
    init: str = ""
    """The image's init: `systemd`, `other`, or `added` when it has none."""
    agent_version: str = ""
    """The first line that the guest agent's `-version` printed."""
    added_paths: Paths = ()
    """What we added to the image's files."""


Seccomp = Literal["", "none", "filter"]
"""What stands before a VMM's system calls: `none` is also a program that lets all through, '' is
not known."""


class SnapshotFacts(_Facts):
    """How a snapshot was taken."""

    vmm_name: str = "Firecracker"
    vmm_version: str = ""
    snapshot_format: str = ""
    """As the VMM numbers it: a load wants the same major one, and no newer a minor one."""
    architecture: str = ""
    """As uname(1) says."""
    cpu_model: str = ""
    snapshot_at: float = 0
    """Wall clock, seconds."""
    boot_seconds: float = 0
    """From the VM's start to the snapshot."""
    kernel_version: str = ""
    fsck_clean: YesNo = False
    """Whether e2fsck found no fault with the disk, which the guest still has mounted."""
    clock_skew_ms: float | None = None
    """The guest's clock minus the host's just before the snapshot; None when it did not tell."""
    clock_error_ms: float = 0
    """How wrong that may be."""
    jailer: str = ""
    """The version of the VMM's jailer, `none` without one, '' when it is not known."""
    seccomp: Seccomp = ""
    """Whether the VMM had a filter before its system calls."""


class Checkpoint(Model):
    """What a step left on a host, in `<data>/steps/<step>/<fingerprint>/`."""

    STEP: ClassVar[Step]
    """Which step leaves this kind."""

    step: Step
    fingerprint: Fingerprint
    host: HostName
    files: dict[str, StoredFile] = Field(default_factory=dict)
    """By `ArtifactName`."""
    facts: RootfsFacts | SnapshotFacts
    reused: bool = False
    """True when the step found it there instead of making it."""


class DiskKey(Model):
    """What names a disk on every host, and its layer in the bucket."""

    owner: str = ""
    """The tenant whose it is; '' is everybody's."""
    fingerprint: Fingerprint
    """Of its checkpoint."""


class RootfsCheckpoint(Checkpoint):
    """A root file system."""

    STEP = Step.ROOTFS

    step: Literal[Step.ROOTFS] = Step.ROOTFS
    facts: RootfsFacts = RootfsFacts()
    chain: tuple[DiskKey, ...] = Field(default=(), exclude_if=lambda chain: not chain)
    """The disks of which each was made by changing the one before; the last is this one. () of
    hosts of before there were layers."""

    @property
    def size_bytes(self) -> int:
        """The size of the file system."""
        return self.files[ArtifactName.ROOTFS].size_bytes


class SnapshotCheckpoint(Checkpoint):
    """A booted VM: its disk, memory and state."""

    STEP = Step.BOOT

    step: Literal[Step.BOOT] = Step.BOOT
    facts: SnapshotFacts = SnapshotFacts()
