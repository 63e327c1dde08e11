"""The inputs of workflows and activities, in pipeline order."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.image_steps import ImageStep, Meaning
from activities.contract.line import TenantTerms
from activities.contract.model import Model
from activities.contract.names import (
    DEFAULT_TENANT,
    ArtifactName,
    BuildId,
    HostName,
    TemplateId,
    TenantName,
)
from activities.contract.network_policy import NO_NETWORK, NetworkPolicy
from activities.contract.references import TagName, TemplateName
from activities.contract.registry_logins import RegistryLogin, Sealed
from activities.contract.requests import BuildOptions, TemplateConfig
from activities.contract.results import (
    BuildCheckpoints,
    ImageConfig,
    PulledImage,
    UploadedArtifact,
    Verification,
)
from activities.contract.scope import BuildScope, VmRef, VmShape
from activities.contract.status import BuildStatus, StepRecord


class BuildInput(Model):
    """The input of the `BuildTemplate` workflow."""

    config: TemplateConfig
    options: BuildOptions = BuildOptions()
    done: BuildCheckpoints | None = None
    """What an earlier run of this build has finished; a retry starts from it."""
    fairness_weight: float = Field(default=1, gt=0, exclude_if=lambda weight: weight == 1)
    """Of its tenant: one of weight 2 gets twice as many hosts as one of 1, while both wait."""
    terms: TenantTerms = Field(
        default=TenantTerms(), exclude_if=lambda terms: terms == TenantTerms()
    )
    network: NetworkPolicy = Field(
        default=NO_NETWORK, exclude_if=lambda network: network == NO_NETWORK
    )
    """What its guests may reach: what the request asks for or, where it does not say, the service's
    default as far as its tenant may. None in older histories."""

    warm_host: HostName | None = Field(default=None, exclude_if=lambda host: host is None)
    """Which host has most of what it begins with: it is asked first, and takes the build only if it
    has a free slot. None in older histories."""

    @property
    def shape(self) -> VmShape:
        """The VM that is to boot."""
        return self.config.shape.model_copy(update={"network": self.network})


class HoldHostInput(Model):
    """Input of `hold_host`."""

    build_id: BuildId
    template_id: TemplateId
    retaken_from: str | None = None
    """The host that already had this lease, when it is asked to take it up again."""
    lifetime_seconds: float
    """How long the host may act without having renewed the lease (heartbeat timeout + grace)."""
    shape: VmShape | None = Field(default=None, exclude_if=lambda shape: shape is None)
    """Of the VM that is to boot: a host that cannot run it does not take the build. None in older
    histories."""
    runs_steps: bool = Field(default=False, exclude_if=lambda runs_steps: not runs_steps)
    """Whether VMs run steps before that one: a host may give these more memory."""


class FindHostInput(Model):
    """Input of `find_host`."""

    shape: VmShape
    refused: tuple[HostName, ...]
    """Hosts that could not run it, whatever their facts say."""


class HostRequest(Model):
    """Input of `tell_host`."""

    draining: bool | None = None
    """Take no new builds any more (True), or again (False); None changes nothing."""


class SweepInput(Model):
    """Input of the sweeps."""

    dry_run: bool = False
    """Only tell what would be removed."""


class PullImageInput(Model):
    """Input of `pull_image`."""

    scope: BuildScope
    image: str
    """As the user gave it, or `repository@digest` once the digest is known."""
    auth: RegistryLogin | None = None
    timeout_seconds: float
    shape: VmShape | None = Field(default=None, exclude_if=lambda shape: shape is None)
    """Of the VM that is to boot: the host must be able to. None in older histories."""


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
    bare: bool = Field(default=False, exclude_if=lambda bare: not bare)
    """Without what a template is told by its request: steps are run on it first."""

    def as_bare(self) -> BuildRootfsInput:
        """Return what makes the disk that is the same for every request of an image."""
        bare = self.image.model_copy(update={"config": ImageConfig()})
        nothing = {"start_command": "", "ready_command": "", "env": {}}
        return self.model_copy(update={"image": bare, **nothing, "bare": True})


class FindSnapshotInput(Model):
    """Input of `find_snapshot`."""

    scope: BuildScope
    rootfs: RootfsCheckpoint
    shape: VmShape


class BuildImageInput(Model):
    """Input of `build_image`."""

    scope: BuildScope
    base: PulledImage
    steps: tuple[ImageStep, ...]
    timeout_seconds: float
    """For each step."""
    force: bool = False


class RunStepsInput(Model):
    """Input of `run_steps`."""

    vm: VmRef
    disk: RootfsCheckpoint
    """A bare root file system, or the disk of the template that is built upon."""
    image: PulledImage
    """Whose config the first step finds."""
    steps: tuple[ImageStep, ...]
    shape: VmShape
    disk_size_mb: int
    """What is free when a step begins, and in the template."""
    timeout_seconds: float
    """For each step."""
    start_command: str
    ready_command: str
    env: dict[str, str]
    force: bool = False
    secret_env: dict[str, Sealed] = Field(default_factory=dict, exclude_if=lambda env: not env)
    """Variables of each `Run`, each sealed for this build and its name."""
    meaning: Meaning = Field(
        default=Meaning.DOCKER, exclude_if=lambda meaning: meaning is Meaning.DOCKER
    )
    start_meaning: Meaning | None = Field(default=None, exclude_if=lambda meaning: meaning is None)
    """Whose words the start command is, where it is a base's; None is the build's own."""
    ready_meaning: Meaning | None = Field(default=None, exclude_if=lambda meaning: meaning is None)
    keep_failed: bool = Field(default=False, exclude_if=lambda keep: not keep)
    """Whether the disk of a step that fails stays on the host, to be looked at."""


class ImportTemplateInput(Model):
    """Input of `import_template`."""

    scope: BuildScope
    build_id: BuildId
    """The template's."""
    shape: VmShape | None = Field(default=None, exclude_if=lambda shape: shape is None)
    """Of the VM that is to boot: the host must be able to. None in older histories."""


class StartVmInput(Model):
    """Input of `start_vm`."""

    vm: VmRef
    rootfs: RootfsCheckpoint
    shape: VmShape


class WaitUntilReadyInput(Model):
    """Input of `wait_until_ready`."""

    vm: VmRef
    timeout_seconds: float


class SnapshotVmInput(Model):
    """Input of `snapshot_vm`."""

    vm: VmRef
    rootfs: RootfsCheckpoint
    shape: VmShape


class VerifySnapshotInput(Model):
    """Input of `verify_snapshot`."""

    vm: VmRef
    snapshot: SnapshotCheckpoint
    shape: VmShape


class SendLayersInput(Model):
    """Input of `send_layers`: the disks that are there, or come to be there."""

    scope: BuildScope
    chain: tuple[DiskKey, ...] = ()
    """Those of the disk that is booted."""
    steps: RunStepsInput | None = None
    """What runs beside it: the disks are those that it begins with and leaves."""


class UploadArtifactInput(Model):
    """Input of `upload_artifact`: sends one file of the snapshot checkpoint."""

    scope: BuildScope
    snapshot: SnapshotCheckpoint
    name: ArtifactName
    chain: tuple[DiskKey, ...] = Field(default=(), exclude_if=lambda chain: not chain)
    """Of the disk that was booted: what it has of these is not sent again."""


class UploadArtifactsInput(Model):
    """Input of `upload_artifacts`: sends those files of the snapshot checkpoint."""

    scope: BuildScope
    snapshot: SnapshotCheckpoint
    names: tuple[ArtifactName, ...]
    chain: tuple[DiskKey, ...] = Field(default=(), exclude_if=lambda chain: not chain)
    """Of the disk that was booted: what it has of these is not sent again."""


class PublishTemplateInput(Model):
    """Input of `publish_template`, which writes `build.log` and, last, `metadata.json`."""

    scope: BuildScope
    config: TemplateConfig
    image: PulledImage
    rootfs: RootfsCheckpoint
    snapshot: SnapshotCheckpoint
    verification: Verification
    uploads: dict[str, UploadedArtifact]
    timeline: tuple[StepRecord, ...]
    network: NetworkPolicy = Field(
        default=NO_NETWORK, exclude_if=lambda network: network == NO_NETWORK
    )
    """What its guest could reach until it was snapshotted."""


class DiscardUploadInput(Model):
    """Input of `discard_upload`, the upload's undo."""

    scope: BuildScope
    keep_parts: bool
    """True after a failure (a retry sends only what is missing), False on cancel and delete."""


class ArchiveLogInput(Model):
    """Input of `archive_log`, which writes `logs/<build_id>.jsonl`."""

    build_id: BuildId
    final_status: BuildStatus


class MoveTagsInput(Model):
    """Input of `move_tags`, which lets tags of a name stand for a published build."""

    tenant: TenantName
    name: TemplateName
    tags: tuple[TagName, ...]
    build_id: BuildId
    asked: datetime
    """When the build was asked for: tags that were moved by a later request stay."""


class DeleteTemplateInput(Model):
    """Input of the `DeleteTemplate` workflow and of its activities."""

    template_id: TemplateId
    build_id: BuildId
    host: str | None = None
    """The host that had the build's checkpoints, if known."""
    own_image: str | None = None
    """The image to untag, only ever the service's own `<registry>/<template_id>:<build_id>`."""
    registry_auth: RegistryLogin | None = None
    late_arrival_seconds: float = 120
    """How long after the delete a frozen host's upload could still arrive."""
    tenant: TenantName = Field(
        default=DEFAULT_TENANT, exclude_if=lambda tenant: tenant == DEFAULT_TENANT
    )


BuildInput.model_rebuild()
