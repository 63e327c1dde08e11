"""The contract of the whole system: every activity's name, input and output, in pipeline order.

Workflows call these by class and method; the rooms that implement them are loaded by workers only.
Every activity may run twice, half, after a crash, or twice at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from temporalio import activity

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.inputs import (
    ArchiveLogInput,
    BuildImageInput,
    BuildRootfsInput,
    DeleteTemplateInput,
    DiscardUploadInput,
    FindHostInput,
    FindSnapshotInput,
    HoldHostInput,
    HostRequest,
    ImportTemplateInput,
    MoveTagsInput,
    PublishTemplateInput,
    PullImageInput,
    RunStepsInput,
    SendLayersInput,
    SnapshotVmInput,
    StartVmInput,
    SweepInput,
    UploadArtifactInput,
    UploadArtifactsInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.line import EnterLineInput, LineLook, LookAtLineInput
from activities.contract.results import (
    DeletedTemplate,
    DiscardedUpload,
    FoundHost,
    HostFacts,
    MovedTags,
    PublishedTemplate,
    PulledImage,
    StoredObject,
    SweepReport,
    UploadedArtifact,
    Verification,
)
from activities.contract.scope import BuildScope, VmRef
from activities.contract.tenant_removal import DeleteBuildInput, FindBuildsInput, TenantBuilds


class HostActivities(ABC):
    """A slot on a host (queues `kvm-hosts` and `kvm-lease.<host>`)."""

    @activity.defn(name="hold_host")
    @abstractmethod
    async def hold_host(self, hold: HoldHostInput, /) -> None:
        """Take a slot, signal `lease_granted`, and heartbeat until cancelled."""


class AskedHostActivities(ABC):
    """A slot on a host that is asked by its name (queue `kvm-lease.<host>`)."""

    @activity.defn(name="hold_host_if_free")
    @abstractmethod
    async def hold_host_if_free(self, hold: HoldHostInput, /) -> None:
        """Hold it as `hold_host` does, unless it has no free slot now."""


class HostReleaseActivities(ABC):
    """Giving a slot back at once (queue `kvm-lease.<host>`)."""

    @activity.defn(name="release_host")
    @abstractmethod
    async def release_host(self, scope: BuildScope, /) -> None:
        """End the hold of this lease: a cancellation would wait for the next heartbeat."""


class TenantLineActivities(ABC):
    """A tenant's own line (queue `template-manager`)."""

    @activity.defn(name="enter_line")
    @abstractmethod
    async def enter_line(self, enter: EnterLineInput, /) -> None:
        """Bring a build into its tenant's line, which is begun if there is none."""

    @activity.defn(name="look_at_line")
    @abstractmethod
    async def look_at_line(self, look: LookAtLineInput, /) -> LineLook:
        """Say which of the builds run no more, and what the tenant's limits are now."""


class HostFindingActivities(ABC):
    """Which hosts can run a build (queue `template-manager`)."""

    @activity.defn(name="find_host")
    @abstractmethod
    async def find_host(self, find: FindHostInput, /) -> FoundHost:
        """Ask all hosts for their facts, and choose one that can run such a VM."""


class CheckpointActivities(ABC):
    """Checkpoints of one host (queue `kvm-host.<host>`)."""

    @activity.defn(name="discard_checkpoints")
    @abstractmethod
    async def discard_checkpoints(self, build_id: str, /) -> None:
        """Drop the build's references, its work directories and its log on this host."""


class ImageActivities(ABC):
    """Container images (queue `kvm-host.<host>`)."""

    @activity.defn(name="pull_image")
    @abstractmethod
    async def pull_image(self, pull: PullImageInput, /) -> PulledImage:
        """Bring the image to the host and resolve it to a digest."""


class ImageStepActivities(ABC):
    """What only hosts of earlier versions do (queue `kvm-host.<host>`)."""

    @activity.defn(name="build_image")
    @abstractmethod
    async def build_image(self, build: BuildImageInput, /) -> PulledImage:
        """Run the steps in containers of the host; one of this version: EarlierWorkerError."""


class TemplateBaseActivities(ABC):
    """Templates that are built upon (queue `kvm-host.<host>`)."""

    @activity.defn(name="import_template")
    @abstractmethod
    async def import_template(self, take: ImportTemplateInput, /) -> PulledImage:
        """Bring the disk of a published template to the host, and make a layer of it."""


class RootfsActivities(ABC):
    """The root file system (queue `kvm-host.<host>`)."""

    @activity.defn(name="build_rootfs")
    @abstractmethod
    async def build_rootfs(self, build: BuildRootfsInput, /) -> RootfsCheckpoint:
        """Make `rootfs.ext4` of the image, unless the host has it, or the bucket as a layer."""

    @activity.defn(name="clean_up_rootfs")
    @abstractmethod
    async def clean_up_rootfs(self, scope: BuildScope, /) -> None:
        """Remove the containers, mounts, loop devices and half-made files of `build_rootfs`."""


class DiskStepActivities(ABC):
    """What is done to a disk before it becomes a template's (queue `kvm-host.<host>`)."""

    @activity.defn(name="run_steps")
    @abstractmethod
    async def run_steps(self, build: RunStepsInput, /) -> RootfsCheckpoint:
        """Run those steps that no checkpoint or layer is left of, then make the disk a
        template's."""


class NetworkActivities(ABC):
    """A VM's netns and TAP (queue `kvm-host.<host>`)."""

    @activity.defn(name="set_up_network")
    @abstractmethod
    async def set_up_network(self, vm: VmRef, /) -> None:
        """Make the VM's netns with `tap0` in it."""

    @activity.defn(name="tear_down_network")
    @abstractmethod
    async def tear_down_network(self, vm: VmRef, /) -> None:
        """Remove the VM's netns, and that of any earlier lease of the same build and purpose."""


class MicrovmActivities(ABC):
    """The VM itself (queue `kvm-host.<host>`)."""

    @activity.defn(name="find_snapshot")
    @abstractmethod
    async def find_snapshot(self, find: FindSnapshotInput, /) -> SnapshotCheckpoint | None:
        """Return the snapshot that an earlier build of the same inputs left, if it is whole."""

    @activity.defn(name="start_vm")
    @abstractmethod
    async def start_vm(self, start: StartVmInput, /) -> None:
        """Start Firecracker in the VM's netns and boot a private copy of the rootfs."""

    @activity.defn(name="wait_until_ready")
    @abstractmethod
    async def wait_until_ready(self, wait: WaitUntilReadyInput, /) -> None:
        """Follow the serial console until the guest says that it is ready."""

    @activity.defn(name="snapshot_vm")
    @abstractmethod
    async def snapshot_vm(self, snapshot: SnapshotVmInput, /) -> SnapshotCheckpoint:
        """Pause, snapshot, kill and wait for the VM; keep `rootfs.ext4`, memfile and snapfile."""

    @activity.defn(name="verify_snapshot")
    @abstractmethod
    async def verify_snapshot(self, verify: VerifySnapshotInput, /) -> Verification:
        """Resume the snapshot in a fresh VM on a copy of the disk; it must answer a ping."""

    @activity.defn(name="kill_vm")
    @abstractmethod
    async def kill_vm(self, vm: VmRef, /) -> None:
        """Kill the VM, wait for its processes, remove its directory; earlier leases' too."""


class LayerActivities(ABC):
    """Layers of a build's disks (queue `kvm-host.<host>`)."""

    @activity.defn(name="send_layers")
    @abstractmethod
    async def send_layers(self, send: SendLayersInput, /) -> int:
        """Make layers of disks while others are made of them; return of how many it has.

        Each goes up as soon as it is there, until the last does or none is made any more. What is
        left out, `upload_artifact` sends.
        """


class ArtifactActivities(ABC):
    """The template in the bucket (queue `kvm-host.<host>`)."""

    @activity.defn(name="upload_artifact")
    @abstractmethod
    async def upload_artifact(self, upload: UploadArtifactInput, /) -> UploadedArtifact:
        """Send an artifact's non-zero blocks, and its header where it has one.

        Of a disk whose chain is told: those that no layer has, after layers of the others were
        made."""

    @activity.defn(name="upload_artifacts")
    @abstractmethod
    async def upload_artifacts(
        self, upload: UploadArtifactsInput, /
    ) -> dict[str, UploadedArtifact]:
        """Send several artifacts one after the other, each as `upload_artifact` does."""

    @activity.defn(name="publish_template")
    @abstractmethod
    async def publish_template(self, publish: PublishTemplateInput, /) -> PublishedTemplate:
        """Check every object, write `build.log`, and commit by writing `metadata.json`."""


class UploadUndoActivities(ABC):
    """The upload's undo (queue `template-manager`: it must also work when the host is gone)."""

    @activity.defn(name="discard_upload")
    @abstractmethod
    async def discard_upload(self, discard: DiscardUploadInput, /) -> DiscardedUpload:
        """Remove what was uploaded, unless a valid `metadata.json` says it is published."""


class NameActivities(ABC):
    """Names of templates and their tags (queue `template-manager`)."""

    @activity.defn(name="move_tags")
    @abstractmethod
    async def move_tags(self, move: MoveTagsInput, /) -> MovedTags:
        """Let tags stand for a published build, all at once, unless a later request has them."""


class LogActivities(ABC):
    """The log of a closed build (queue `template-manager`)."""

    @activity.defn(name="archive_log")
    @abstractmethod
    async def archive_log(self, archive: ArchiveLogInput, /) -> StoredObject:
        """Write the build's log and final status to `logs/<build_id>.jsonl`. A build without a
        template lets go of its layers."""


class HostFactsActivities(ABC):
    """What a host tells of itself (queue `kvm-host.<host>`)."""

    @activity.defn(name="tell_host")
    @abstractmethod
    async def tell_host(self, request: HostRequest, /) -> HostFacts:
        """Drain or resume if that is asked for, then tell slots, builds, disk and versions."""


class HostSweepActivities(ABC):
    """Removing what no live build owns from a host (queue `kvm-host.<host>`)."""

    @activity.defn(name="sweep_host")
    @abstractmethod
    async def sweep_host(self, sweep: SweepInput, /) -> SweepReport:
        """Remove what no live build owns, then evict checkpoints that are old or too many."""


class BucketSweepActivities(ABC):
    """Removing what no build can use any more from the bucket (queue `template-manager`)."""

    @activity.defn(name="sweep_bucket")
    @abstractmethod
    async def sweep_bucket(self, sweep: SweepInput, /) -> SweepReport:
        """Remove parts and leases of builds that can no longer use them; count what is stored."""


class TenantRemovalActivities(ABC):
    """Removing all that is a tenant's (queue `template-manager`)."""

    @activity.defn(name="find_builds_of_tenant")
    @abstractmethod
    async def find_builds_of_tenant(self, find: FindBuildsInput, /) -> TenantBuilds:
        """Look in Temporal and in the bucket, until some are found."""

    @activity.defn(name="delete_build_of_tenant")
    @abstractmethod
    async def delete_build_of_tenant(self, delete: DeleteBuildInput, /) -> None:
        """Delete a build as `TemplateBuildDelete` does; one that has gone is fine."""

    @activity.defn(name="delete_objects_of_tenant")
    @abstractmethod
    async def delete_objects_of_tenant(self, tenant: str, /) -> int:
        """Delete the tenant's files, and logs of builds that are not known any more."""


class DeletionActivities(ABC):
    """Removing a template (queue `template-manager`)."""

    @activity.defn(name="delete_objects")
    @abstractmethod
    async def delete_objects(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        """Leave a tombstone in `.leases/`, then remove all objects, `metadata.json` first."""

    @activity.defn(name="delete_image_tag")
    @abstractmethod
    async def delete_image_tag(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        """Remove the service's own tag from the registry, never a user's image."""

    @activity.defn(name="remove_late_arrivals")
    @abstractmethod
    async def remove_late_arrivals(self, deleted: DeletedTemplate, build_id: str, /) -> int:
        """Remove what came in after the delete, then the tombstone; a new build is left alone."""
