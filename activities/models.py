"""The types that api, workflows and activities share.

Sizes say their unit in their name: `_mb` is MiB (as E2B's API means it), `_bytes` is bytes,
`_seconds` and `_ms` are time. Everything here is plain data and loads nothing heavy.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def canonical_build_id(value: str) -> str:
    """Return the canonical lower-case form of a UUID.

    Raises ValueError when `value` is not a UUID in its usual 36-character form.
    """
    try:
        parsed = uuid.UUID(value)
    except (ValueError, AttributeError) as error:
        raise ValueError("must be a UUID such as 4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d") from error
    if str(parsed) != value.lower():
        raise ValueError("must be a UUID in its 36-character form")
    return str(parsed)


UUID_PATTERN = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VM_NAME = re.compile(rf"tm-(?P<build_id>{UUID_PATTERN})-(?P<number>\d+)-(?P<purpose>[a-z]+)")
BuildId = Annotated[str, AfterValidator(canonical_build_id)]
TemplateId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]
ImageDigest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62})$")]

WORKFLOW_TASK_QUEUE = "template-manager"
SHARED_HOST_TASK_QUEUE = "kvm-hosts"


# As a start command: what the image itself would run.
IMAGE_COMMAND = "image"
MAX_STEP_CHARS = 100
MAX_IMAGE_STEPS = 100
SWEEP_HOST_WORKFLOW = "SweepHost"
SWEEP_BUCKET_WORKFLOW = "SweepBucket"
INSPECT_HOST_WORKFLOW = "InspectHost"


BUILD_WORKFLOW = "template-build-"
DELETE_WORKFLOW = "template-delete-"


def build_workflow_id(build_id: str) -> str:
    """Name the workflow that builds `build_id`."""
    return f"{BUILD_WORKFLOW}{build_id}"


def delete_workflow_id(build_id: str) -> str:
    """Name the workflow that deletes `build_id`."""
    return f"{DELETE_WORKFLOW}{build_id}"


def build_of_workflow(workflow_id: str) -> str:
    """Return the build that a workflow builds or deletes; "" when it does neither."""
    for prefix in (BUILD_WORKFLOW, DELETE_WORKFLOW):
        if workflow_id.startswith(prefix):
            return workflow_id.removeprefix(prefix)
    return ""


def utc_now() -> datetime:
    """Return the wall clock with its zone. Not for workflow code: use `workflow.now()` there."""
    return datetime.now(UTC)


class Model(BaseModel):
    """Base of all models here: immutable. Unknown fields are ignored, so that workers of two
    versions can talk to each other during an upgrade."""

    model_config = ConfigDict(frozen=True)


# ---- What a user asks for


class Sealed(Model):
    """A secret, encrypted by the API and opened only by the activity that needs it.

    `token` is base64(nonce ‖ AES-256-GCM ciphertext); the build id is its associated data.
    """

    key_id: str
    token: str


class RegistryAuth(Model):
    """How to log in to the registry that holds the image.

    `google_key` takes a service account's JSON as secret, `google_default` uses the host's
    default credentials, `aws` takes the access key id as user name and asks ECR for a token.
    """

    kind: Literal["password", "google_key", "google_default", "aws"]
    username: str = ""
    secret: Sealed | None = None
    region: str = ""


class BuildStep(Model):
    """An instruction on top of the base image, as in a Dockerfile.

    RUN: command[, user]. COPY: source, destination[, user[, octal mode]]; the source is a path or
    glob in the tar `files/<files_sha256>.tar` of the bucket. ENV: name, value, name, value, …
    ARG: name, value; for later RUNs only. WORKDIR: path. USER: name.
    """

    kind: Literal["RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER"]
    args: tuple[str, ...]
    force: bool = False
    """Run it and all later steps, whatever has been kept of an earlier build."""
    files_sha256: str = ""

    def __str__(self) -> str:
        """Return it on one line, for people."""
        text = " ".join([self.kind, *(arg for arg in self.args if arg)])
        line = " ".join(text.split())
        return line if len(line) <= MAX_STEP_CHARS else f"{line[: MAX_STEP_CHARS - 1]}…"


class TemplateConfig(Model):
    """A validated request for one template. Its limits are enforced by `api.validation`."""

    template_id: TemplateId
    build_id: BuildId
    image: str
    image_is_default: bool = False
    """True when the image is the service's own `<registry>/<template_id>:<build_id>`; only then
    may delete remove its tag."""
    registry_auth: RegistryAuth | None = None
    memory_mb: int
    vcpu_count: int
    disk_size_mb: int
    kernel_version: PlainName
    firecracker_version: PlainName
    start_command: str = ""
    ready_command: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    huge_pages: bool = False
    force: bool = False
    team_id: str = ""
    steps: tuple[BuildStep, ...] = ()
    """What is done to the image before it becomes a template."""
    from_template: BuildId | None = None
    """The template whose root file system is the base, instead of `image`."""
    ready_timeout_seconds: float | None = None
    """For this template, instead of the one in the options."""


class BuildOptions(Model):
    """Time limits of a build, in seconds. Tests shorten them; users get the settings' values."""

    heartbeat_timeout_seconds: float = 30
    lease_grace_seconds: float = 60
    lease_wait_seconds: float = 24 * 3600
    """How long a build waits for a host with a free slot."""
    pull_timeout_seconds: float = 1800
    provision_timeout_seconds: float = 300
    image_step_timeout_seconds: float = 3600
    rootfs_timeout_seconds: float = 3600
    ready_timeout_seconds: float = 300
    upload_timeout_seconds: float = 3600
    teardown_timeout_seconds: float = 600
    max_hosts: int = 5
    """How many hosts a build may lose before it fails."""
    retry_attempts: int = 5
    retry_initial_seconds: float = 1
    retry_maximum_seconds: float = 30


class Step(StrEnum):
    """The steps of a build, in order. The names are what users and operators see."""

    LEASE = "lease_host"
    PULL = "pull_image"
    ROOTFS = "build_rootfs"
    BOOT = "boot_and_snapshot"
    VERIFY = "verify"
    UPLOAD = "upload"
    RELEASE = "release_host"


class BuildInput(Model):
    """The input of the `BuildTemplate` workflow."""

    config: TemplateConfig
    options: BuildOptions = BuildOptions()
    done: BuildCheckpoints | None = None
    """What an earlier run of this build has finished; a retry starts from it."""


# ---- Where it runs


class HostLease(Model):
    """A build's right to a slot of one host.

    `number` is the generation of the object `.leases/<build_id>` in the bucket: a later lease has
    a higher number, and whoever carries a lower one may not change anything any more.
    """

    host: HostName
    number: int

    @property
    def step_queue(self) -> str:
        """The task queue on which this host runs steps."""
        return step_task_queue(self.host)

    @property
    def lease_queue(self) -> str:
        """The task queue on which this host takes up a lease again."""
        return lease_task_queue(self.host)


def step_task_queue(host: str) -> str:
    """Name the queue on which `host` runs the steps of the builds that it holds."""
    return f"kvm-host.{host}"


def lease_task_queue(host: str) -> str:
    """Name the queue on which `host` takes up again the builds that it already holds."""
    return f"kvm-lease.{host}"


class BuildScope(Model):
    """Whose work it is and by which right: part of the input of every activity on a host."""

    build_id: BuildId
    template_id: TemplateId
    lease: HostLease


class HoldHostInput(Model):
    """Input of `hold_host`."""

    build_id: BuildId
    template_id: TemplateId
    retaken_from: str | None = None
    """The host that already had this lease, when it is asked to take it up again."""
    lifetime_seconds: float
    """How long the host may act without having renewed the lease (heartbeat timeout + grace)."""


# ---- What the steps leave


class ImageConfig(Model):
    """What the image's own config says about running it (OCI image spec, `config`)."""

    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()


class PulledImage(Model):
    """An image on the host, at a digest."""

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

    @property
    def reference_to_pull(self) -> str:
        """What to pull to have this image, or its base, on another host."""
        return self.base_reference or self.reference


class StoredFile(Model):
    """One file of a checkpoint. `sha256` is of the whole content, holes read as zeros."""

    size_bytes: int
    allocated_bytes: int
    sha256: str
    mtime_ns: int = 0


class Checkpoint(Model):
    """What a step left on a host, in `<data>/steps/<step>/<fingerprint>/`."""

    step: Step
    fingerprint: Fingerprint
    host: HostName
    files: dict[str, StoredFile]
    facts: dict[str, str | int | float] = Field(default_factory=dict)
    reused: bool = False
    """True when the step found it there instead of making it."""


class VmPurpose(StrEnum):
    """Why a VM runs."""

    BOOT = "boot"
    VERIFY = "verify"


class VmName(NamedTuple):
    """What the name of a VM says."""

    build_id: str
    lease_number: int
    purpose: str


def parse_vm_name(name: str) -> VmName | None:
    """Read a name that `VmRef.name` has made; None for any other name."""
    found = VM_NAME.fullmatch(name)
    return VmName(found["build_id"], int(found["number"]), found["purpose"]) if found else None


class VmRef(Model):
    """Names one VM, its netns, its directory and its processes on a host."""

    scope: BuildScope
    purpose: VmPurpose

    @property
    def name(self) -> str:
        """`tm-<build id>-<lease number>-<purpose>`; also the name of its netns."""
        return f"tm-{self.scope.build_id}-{self.scope.lease.number}-{self.purpose}"


class VmShape(Model):
    """What a VM is made of, besides its disk."""

    memory_mb: int
    vcpu_count: int
    kernel_version: PlainName
    firecracker_version: PlainName
    huge_pages: bool = False


class Verification(Model):
    """What resuming the snapshot showed."""

    resume_ms: float
    """From the start of snapshot/load to the first answer on the network."""
    load_ms: float
    clock_skew_ms: float
    """Guest clock minus host clock; negative when the guest is behind."""
    seconds_since_snapshot: float


class StoredObject(Model):
    """An object in the bucket, by the generation that was written."""

    name: str
    generation: int
    size_bytes: int
    crc32c: str
    """Base64 of the big-endian CRC32C, as Google Cloud Storage gives it."""


class HostRequest(Model):
    """Input of `tell_host`."""

    draining: bool | None = None
    """Take no new builds any more (True), or again (False); None changes nothing."""


class HostBuild(Model):
    """A build that a host holds."""

    build_id: BuildId
    template_id: str
    since: float
    """Wall clock, seconds."""


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


class SweepInput(Model):
    """Input of the sweeps."""

    dry_run: bool = False
    """Only tell what would be removed."""


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


class UploadedArtifact(Model):
    """An artifact in the bucket: its data, and its header where it has one."""

    name: str
    objects: dict[str, StoredObject]
    size_bytes: int
    """The size of the file it stands for, holes included."""
    sent_bytes: int
    sha256: str


class PublishedTemplate(Model):
    """A template whose metadata is in the bucket: it exists."""

    bucket: str
    prefix: str
    metadata: StoredObject
    artifacts: dict[str, UploadedArtifact]


class BuildCheckpoints(Model):
    """The state of a build: what each step has left. A new run can start from it."""

    image: PulledImage | None = None
    rootfs: Checkpoint | None = None
    snapshot: Checkpoint | None = None
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


# ---- What is told of a build


class LogLevel(StrEnum):
    """Level of a build log line; the order is that of severity."""

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class LogEntry(Model):
    """One line of a build log."""

    timestamp: datetime
    level: LogLevel
    message: str
    step: Step | None = None
    fields: dict[str, str] = Field(default_factory=dict)


LOG_TOPIC = "log"


class Progress(Model):
    """How far a running step is. Travels as heartbeat detail."""

    what: str
    done: int = 0
    total: int = 0
    unit: Literal["bytes", "files", "layers", "attempts", ""] = ""


class BuildState(StrEnum):
    """The state of a build as its search attribute `BuildState` and the API tell it."""

    BUILDING = "building"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class BuildFailure(Model):
    """Why a build failed, in words that say what to do next."""

    error_type: str
    message: str
    step: Step | None = None
    hint: str = ""
    log_tail: tuple[str, ...] = ()


class StepRecord(Model):
    """One row of a build's timeline."""

    step: Step
    started: datetime
    ended: datetime | None = None
    reused: bool = False
    attempts: int = 1
    host: str | None = None
    outcome: Literal["running", "done", "failed", "cancelled", "rewound"] = "running"

    @property
    def seconds(self) -> float | None:
        """How long it took, or None while it runs."""
        return (self.ended - self.started).total_seconds() if self.ended else None


class BuildStatus(Model):
    """What the workflow's query `status` answers."""

    config: TemplateConfig
    state: BuildState
    step: Step
    host: str | None
    lease_number: int | None
    done: BuildCheckpoints
    timeline: tuple[StepRecord, ...]
    failure: BuildFailure | None = None
    published: PublishedTemplate | None = None


class BuildResult(Model):
    """What a finished `BuildTemplate` returns."""

    published: PublishedTemplate
    timeline: tuple[StepRecord, ...]
    image: PulledImage
    verification: Verification
    rootfs_size_mb: int
    agent_version: str = ""


# ---- Inputs of the activities, in pipeline order


class PullImageInput(Model):
    """Input of `pull_image`."""

    scope: BuildScope
    image: str
    """As the user gave it, or `repository@digest` once the digest is known."""
    auth: RegistryAuth | None = None
    timeout_seconds: float


class BuildRootfsInput(Model):
    """Input of `build_rootfs`."""

    scope: BuildScope
    image: PulledImage
    disk_size_mb: int
    memory_mb: int
    start_command: str
    ready_command: str
    env: dict[str, str]
    ready_timeout_seconds: float
    provision_timeout_seconds: float
    force: bool = False


class FindSnapshotInput(Model):
    """Input of `find_snapshot`."""

    scope: BuildScope
    rootfs: Checkpoint
    shape: VmShape


class BuildImageInput(Model):
    """Input of `build_image`."""

    scope: BuildScope
    base: PulledImage
    steps: tuple[BuildStep, ...]
    timeout_seconds: float
    """For each step."""
    force: bool = False


class ImportTemplateInput(Model):
    """Input of `import_template`."""

    scope: BuildScope
    build_id: BuildId
    """The template's."""


class StartVmInput(Model):
    """Input of `start_vm`."""

    vm: VmRef
    rootfs: Checkpoint
    shape: VmShape


class WaitUntilReadyInput(Model):
    """Input of `wait_until_ready`."""

    vm: VmRef
    timeout_seconds: float


class SnapshotVmInput(Model):
    """Input of `snapshot_vm`."""

    vm: VmRef
    rootfs: Checkpoint
    shape: VmShape


class VerifySnapshotInput(Model):
    """Input of `verify_snapshot`."""

    vm: VmRef
    snapshot: Checkpoint
    shape: VmShape


class UploadArtifactInput(Model):
    """Input of `upload_artifact`: sends one file of the snapshot checkpoint."""

    scope: BuildScope
    snapshot: Checkpoint
    name: Literal["rootfs.ext4", "memfile", "snapfile"]
    block_size_bytes: int = 4096


class PublishTemplateInput(Model):
    """Input of `publish_template`, which writes `build.log` and, last, `metadata.json`."""

    scope: BuildScope
    config: TemplateConfig
    image: PulledImage
    rootfs: Checkpoint
    snapshot: Checkpoint
    verification: Verification
    uploads: dict[str, UploadedArtifact]
    timeline: tuple[StepRecord, ...]


class DiscardUploadInput(Model):
    """Input of `discard_upload`, the upload's undo."""

    scope: BuildScope
    keep_parts: bool
    """True after a failure (a retry sends only what is missing), False on cancel and delete."""


class DiscardedUpload(Model):
    """What `discard_upload` found."""

    published: PublishedTemplate | None
    """Set when a valid `metadata.json` is there: then the build has succeeded."""
    removed_objects: int = 0


class ArchiveLogInput(Model):
    """Input of `archive_log`, which writes `logs/<build_id>.jsonl`."""

    build_id: BuildId
    final_status: BuildStatus


class DeleteTemplateInput(Model):
    """Input of the `DeleteTemplate` workflow and of its activities."""

    template_id: TemplateId
    build_id: BuildId
    host: str | None = None
    """The host that had the build's checkpoints, if known."""
    own_image: str | None = None
    """The image to untag, only ever the service's own `<registry>/<template_id>:<build_id>`."""
    registry_auth: RegistryAuth | None = None
    late_arrival_seconds: float = 120
    """How long after the delete a frozen host's upload could still arrive."""


class DeletedTemplate(Model):
    """What a delete removed."""

    removed_objects: int = 0
    removed_tag: bool = False
    kept_tag_reason: str = ""
    tombstone_generation: int | None = None


BuildInput.model_rebuild()

IMAGE_REFERENCE = re.compile(
    # The grammar of github.com/distribution/reference, without its length checks.
    r"^(?:(?P<domain>(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)"
    r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::[0-9]+)?)/)?"
    r"(?P<path>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?$"
)
