"""What steps leave and activities answer.

Sizes say their unit in their name: `_mb` is MiB (as E2B's API means it), `_bytes` is bytes,
`_seconds` and `_ms` are time.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.model import Model
from activities.contract.names import (
    DEFAULT_TENANT,
    BuildId,
    HostName,
    ImageDigest,
    Step,
    TenantName,
)
from activities.contract.requests import Commands
from activities.contract.units import KIB

MAX_IMAGE_CONFIG_BYTES = 320 * KIB
"""Of an image's config, as JSON: it goes to one activity after the other."""


class ImageConfig(Model):
    """What the image's own config says about running it (OCI image spec, `config`)."""

    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = Field(default=(), exclude_if=lambda test: not test)
    """Its test: `CMD` or `CMD-SHELL`, and words or a line; `NONE`, or nothing at all."""

    @property
    def kept_bytes(self) -> int:
        """How much of it goes from activity to activity."""
        return len(self.model_dump_json().encode())

    @property
    def variables(self) -> dict[str, str]:
        """What `env` sets, by name; a word without a value sets nothing."""
        return dict(each.split("=", 1) for each in self.env if "=" in each)


class TemplateBase(Model):
    """What a template that is built upon gives besides what an image has."""

    disk: RootfsCheckpoint
    """As it was snapshotted: blocks that nobody on the host looks into."""
    commands: Commands = Commands()


class PulledImage(Model):
    """An image, or the disk of a template, on the host, at a digest."""

    reference: str
    """`repository@sha256:…`: what another host pulls to get the same image."""
    digest: ImageDigest
    image_id: str
    architecture: str
    size_bytes: int
    layer_count: int
    config: ImageConfig
    base_reference: str = ""
    """For an image that steps have made here: what another host pulls to begin with."""
    tenant: str = Field(default="", exclude_if=lambda tenant: not tenant)
    """Whose alone it is: its registry wanted a login, or a tenant's steps or sandboxes made it.
    '' is everybody's."""
    base: TemplateBase | None = Field(default=None, exclude_if=lambda base: base is None)
    """Of a template; None for an image, also for those that earlier versions made of templates."""

    @property
    def reference_to_pull(self) -> str:
        """What to pull to have this image, or its base, on another host."""
        return self.base_reference or self.reference


class UsedBlocks(NamedTuple):
    """A stretch of the guest's memory, in blocks of 4096 bytes, and whether it was written."""

    first: int
    length: int
    access: str
    """`r` or `w`."""


class Verification(Model):
    """What resuming the snapshot showed."""

    resume_ms: float
    """From the start of snapshot/load to the first answer on the network."""
    load_ms: float
    clock_skew_ms: float
    """Guest clock minus host clock; negative when the guest is behind."""
    seconds_since_snapshot: float
    prefetch: tuple[UsedBlocks, ...] = Field(default=(), exclude_if=lambda used: not used)
    """What the guest had used of its memory when it had answered; () where the VMM tells nothing.
    Whoever resumes the snapshot may read it before the guest asks for it."""


class StoredObject(Model):
    """An object in the bucket, by the generation that was written."""

    name: str
    generation: int
    size_bytes: int
    crc32c: str
    """Base64 of the big-endian CRC32C, as Google Cloud Storage gives it."""


class HostBuild(Model):
    """A build that a host holds."""

    build_id: BuildId
    template_id: str
    since: float
    """Wall clock, seconds."""


class MachineFacts(Model):
    """What kind of machine a host is, and how busy. Processor fields are as /proc/cpuinfo's."""

    cpu_architecture: str = ""
    cpu_family: str = ""
    cpu_model: str = ""
    cpu_model_name: str = ""
    cpu_flags: tuple[str, ...] = ()
    cpu_count: int = 0
    cpu_percent: float = 0
    """Of all processors together: 0 to 100."""
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0


class HostFacts(Model):
    """What a host tells of itself."""

    host: HostName
    draining: bool
    slots: int
    builds: tuple[HostBuild, ...]
    disk_free_bytes: int
    disk_total_bytes: int
    checkpoint_bytes: int
    kernel_versions: tuple[str, ...]
    firecracker_versions: tuple[str, ...]
    version: str
    """Of template-manager."""
    machine: MachineFacts | None = None
    """None from a host of an earlier version."""
    has_agent: bool | None = None
    """Whether it has a guest agent; None from a host of an earlier version."""
    leads_out: bool = False
    """Whether its guests can be led to the internet; those of an earlier version cannot."""
    lacks: str = ""
    """Which room it lacks to take any build; '' when it has it."""


class FoundHost(Model):
    """What `find_host` has found."""

    host: HostName | None = None
    """One that can run it; the one with the most free slots."""
    is_drained: bool = False
    """Whether one can run it that takes no builds now."""
    may_come: bool = False
    """Whether there is one that does not answer now."""


class SweptItem(Model):
    """Something that no live build owned."""

    kind: str
    name: str
    build_id: str = ""
    bytes: int = 0
    error: str = ""
    """Why it could not be removed, or ''."""


class SweepReport(Model):
    """What a sweep has found and, unless `dry_run`, removed."""

    items: tuple[SweptItem, ...] = ()
    dry_run: bool = False

    @property
    def bytes(self) -> int:
        """Return what was (or would be) freed."""
        return sum(item.bytes for item in self.items if not item.error)


class LayerReference(Model):
    """A layer in the bucket that a disk needs: its data and header, as those of an artifact."""

    layer_id: BuildId
    objects: dict[str, StoredObject]


class UploadedArtifact(Model):
    """An artifact in the bucket: its data, and its header where it has one."""

    name: str
    objects: dict[str, StoredObject]
    size_bytes: int
    """The size of the file it stands for, holes included."""
    sent_bytes: int
    sha256: str
    layers: tuple[LayerReference, ...] = Field(default=(), exclude_if=lambda layers: not layers)
    """Those that have the blocks which its own data lack, the lowest first."""

    @property
    def stored(self) -> list[StoredObject]:
        """Every object that it needs."""
        of_layers = (stored for layer in self.layers for stored in layer.objects.values())
        return [*self.objects.values(), *of_layers]


class PublishedTemplate(Model):
    """A template whose metadata is in the bucket: it exists."""

    bucket: str
    prefix: str
    metadata: StoredObject
    artifacts: dict[str, UploadedArtifact]


class BuildCheckpoints(Model):
    """The state of a build: what each step has left. A new run can start from it."""

    image: PulledImage | None = None
    rootfs: RootfsCheckpoint | None = None
    snapshot: SnapshotCheckpoint | None = None
    verification: Verification | None = None
    uploads: dict[str, UploadedArtifact] = Field(default_factory=dict)
    host: str | None = None
    """The host that has the host-local parts (image, rootfs, snapshot)."""
    image_is_on_host: bool = False
    """False when only its digest is known, from another host."""

    @property
    def image_on_host(self) -> PulledImage | None:
        """The image, if the host has it."""
        return self.image if self.image_is_on_host else None

    def before(self, step: Step) -> BuildCheckpoints:
        """Return what remains when `step` and all later steps must be done again."""
        order = list(Step)
        keep = {
            "image": Step.PULL,
            "rootfs": Step.ROOTFS,
            "snapshot": Step.BOOT,
            "verification": Step.VERIFY,
            "uploads": Step.UPLOAD,
        }
        dropped: dict[str, object] = {
            field: {} if field == "uploads" else None
            for field, made_by in keep.items()
            if order.index(made_by) >= order.index(step)
        }
        if step is Step.PULL:  # the digest stays: the tag may name another image by now
            dropped = {**dropped, "image": self.image, "image_is_on_host": False}
        return self.model_copy(update=dropped)

    def on_other_host(self) -> BuildCheckpoints:
        """Return what is still true on another host: only which image it was."""
        return BuildCheckpoints(image=self.image)


class DiscardedUpload(Model):
    """What `discard_upload` found."""

    published: PublishedTemplate | None
    """Set when a valid `metadata.json` is there: then the build has succeeded."""
    removed_objects: int = 0


class MovedTags(Model):
    """What `move_tags` has done."""

    kept: tuple[str, ...] = ()
    """Tags that stand for what was asked for later, and so were not moved."""


class DeletedTemplate(Model):
    """What a delete removed."""

    removed_objects: int = 0
    removed_tag: bool = False
    kept_tag_reason: str = ""
    tombstone_generation: int | None = None
    names: tuple[str, ...] = ()
    """The tags that stood for it, as `name:tag`, and its template's name if it was the last."""
    tenant: TenantName = Field(
        default=DEFAULT_TENANT, exclude_if=lambda tenant: tenant == DEFAULT_TENANT
    )
