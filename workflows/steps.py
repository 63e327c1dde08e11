"""The steps of a build on the host that holds it, in pipeline order.

Each keeps what it leaves; what it may leave behind is registered to be undone before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.errors import EarlierWorkerError, TemplateTooLargeError, error_type_of
from activities.contract.image_steps import Meaning
from activities.contract.inputs import (
    BuildImageInput,
    BuildInput,
    BuildRootfsInput,
    DiscardUploadInput,
    FindSnapshotInput,
    ImportTemplateInput,
    PublishTemplateInput,
    PullImageInput,
    RunStepsInput,
    SendLayersInput,
    SnapshotVmInput,
    StartVmInput,
    UploadArtifactInput,
    UploadArtifactsInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.interface import (
    ArtifactActivities,
    DiskStepActivities,
    ImageActivities,
    ImageStepActivities,
    LayerActivities,
    MicrovmActivities,
    RootfsActivities,
    TemplateBaseActivities,
    UploadUndoActivities,
)
from activities.contract.names import WORKFLOW_TASK_QUEUE, ArtifactName, VmPurpose
from activities.contract.requests import Commands
from activities.contract.results import (
    PublishedTemplate,
    PulledImage,
    Verification,
)
from activities.contract.scope import BuildScope, VmShape
from activities.contract.sources import FromImage, FromTemplate
from activities.contract.status import BuildState
from activities.contract.step_context import config_after
from activities.contract.units import MIB
from workflows.calling import call
from workflows.compensations import Compensations, Undo
from workflows.kept import Kept
from workflows.leased_host import LeasedHost
from workflows.telling import Telling

# Before it, steps were run on the image, in containers of the host.
STEPS_IN_VMS = "steps-in-vms"
# Before it, nobody looked at the disk that comes with a template: a newer host may have told of it.
TEMPLATES_AS_DISKS = "templates-as-disks"
# What Temporal's worker says of an activity that it does not know.
NOT_SERVED = "NotFoundError"


class BuildSteps:
    """The work of each step of one build."""

    def __init__(
        self, build: BuildInput, kept: Kept, telling: Telling, undos: Compensations
    ) -> None:
        self._config = build.config
        self._shape = build.shape
        self._options = build.options
        self._terms = build.terms
        self._kept = kept
        self._telling = telling
        self._undos = undos
        self._discards: dict[int, Undo] = {}

    # ---- The image

    def kept_image(self) -> PulledImage | None:
        """Return the image that the host has, if it is what the pipeline goes on with."""
        image, rootfs = self._kept.done.image_on_host, self._kept.done.rootfs
        if image is not None and not image.image_id and image.base is None:
            return None  # a template: a worker of an earlier version has forgotten its disk
        if image is None or not image.base_reference or rootfs is not None:
            return image
        # An earlier run had the steps done to it, in containers.
        return None if self._steps_in_vms() else image

    async def pull(self, host: LeasedHost) -> PulledImage:
        """Bring the image to the host."""
        source = self._config.source
        if isinstance(source, FromTemplate):
            image = await self._import(host, source)
        else:
            self._steps_in_vms()  # where builds that are running have asked it
            image = await self._pull(host, source)
        if self._config.steps and image.base is None and not self._steps_in_vms():
            image = await self._with_steps_in_containers(host, image)
        self._kept.keep(image=image, image_is_on_host=True)
        return image

    async def _import(self, host: LeasedHost, source: FromTemplate) -> PulledImage:
        image = await host.run(
            TemplateBaseActivities.import_template,
            ImportTemplateInput(scope=host.scope, build_id=source.build_id, shape=self._shape),
            f"take {source.described}",
        )
        if workflow.patched(TEMPLATES_AS_DISKS):
            return image
        return image.model_copy(update={"base": None})

    async def _pull(self, host: LeasedHost, source: FromImage) -> PulledImage:
        known = self._kept.done.image
        return await host.run(
            ImageActivities.pull_image,
            PullImageInput(
                scope=host.scope,
                image=known.reference_to_pull if known else source.reference,
                auth=source.login,
                timeout_seconds=self._options.pull_timeout_seconds,
                shape=self._shape,
            ),
            f"pull {source.described}",
        )

    async def _with_steps_in_containers(self, host: LeasedHost, base: PulledImage) -> PulledImage:
        """Have a host of an earlier version run them; one of this version does it in VMs, later."""
        try:
            return await self._build_image(host, base)
        except ActivityError as error:
            if error_type_of(error) != EarlierWorkerError.__name__:
                raise
        return base

    async def _build_image(self, host: LeasedHost, base: PulledImage) -> PulledImage:
        steps = self._config.steps
        build = BuildImageInput(
            scope=host.scope,
            base=base,
            steps=steps,
            timeout_seconds=self._options.image_step_timeout_seconds,
            force=self._config.force,
        )
        async with self._undos.until_done(_clean_up(host)):
            return await host.run(
                ImageStepActivities.build_image, build, f"{len(steps)} steps on {base.digest[:19]}"
            )

    # ---- Layers of its disks

    def _send_ahead(
        self, host: LeasedHost, chain: Sequence[DiskKey], steps: RunStepsInput | None = None
    ) -> None:
        """Have disks sent while the build goes on: those of the chain, or of the steps on it."""
        if not (host.lease.sends_ahead and chain) or host.has_run_aside:
            return
        self._undos.put_beneath(self._discard(host))
        host.run_aside(
            LayerActivities.send_layers,
            SendLayersInput(scope=host.scope, chain=() if steps else tuple(chain), steps=steps),
            "send layers while the build goes on",
            self._not_sent_ahead,
        )

    def _not_sent_ahead(self, why: str) -> None:
        self._telling.warn(f"layers go up with the template, and not before it: {why}")

    # ---- The root file system

    async def build_rootfs(self, host: LeasedHost, image: PulledImage) -> RootfsCheckpoint:
        """Make `rootfs.ext4` of the image, and run the request's steps on it."""
        if image.base is not None:
            if self._commands(image) != self._config.commands_on(None):
                self._telling.say("the commands that the request leaves out are its base's")
            rootfs = await self._run_steps(host, image, image.base.disk)
        elif self._has_steps_to_run(image):
            rootfs = await self._rootfs_with_steps(host, image)
        else:
            rootfs = await self._flatten(host, self._rootfs_input(host, image))
        self._require_size(rootfs)
        self._kept.keep(rootfs=rootfs)
        return rootfs

    def _require_size(self, rootfs: RootfsCheckpoint) -> None:
        most, size = self._terms.template_mb, rootfs.size_bytes // MIB + self._config.memory_mb
        if most is not None and size > most:
            raise TemplateTooLargeError(
                f"disk and memory are {size} MiB; one template of tenant {self._config.tenant} may "
                f"have {most} MiB"
            ).to_application_error()

    async def _rootfs_with_steps(self, host: LeasedHost, image: PulledImage) -> RootfsCheckpoint:
        bare = await self._flatten(host, self._rootfs_input(host, image).as_bare())
        try:
            return await self._run_steps(host, image, bare)
        except ActivityError as error:
            if error_type_of(error) != NOT_SERVED or self._needs_vms():
                raise
        self._telling.warn("the host is of an earlier version: it runs steps in containers")
        made = await self._with_steps_in_containers(host, image)
        if not made.base_reference:  # it has been upgraded in the meantime
            return await self._run_steps(host, image, bare)
        return await self._flatten(host, self._rootfs_input(host, made))

    def _rootfs_input(self, host: LeasedHost, image: PulledImage) -> BuildRootfsInput:
        return BuildRootfsInput(
            scope=host.scope,
            image=image,
            disk_size_mb=self._config.disk_size_mb,
            memory_mb=self._config.memory_mb,
            start_command=self._config.start_command,
            ready_command=self._config.ready_command,
            env=self._config.env,
            ready_timeout_seconds=self._options.ready_timeout_seconds,
            provision_timeout_seconds=self._options.provision_timeout_seconds,
            force=self._config.force,
        )

    async def _flatten(self, host: LeasedHost, build: BuildRootfsInput) -> RootfsCheckpoint:
        async with self._undos.until_done(_clean_up(host)):
            return await host.run(
                RootfsActivities.build_rootfs,
                build,
                f"make rootfs.ext4 of {build.image.digest[:19]}",
            )

    async def _run_steps(
        self, host: LeasedHost, image: PulledImage, disk: RootfsCheckpoint
    ) -> RootfsCheckpoint:
        steps, commands = self._config.steps, self._commands(image)
        # A purpose that a host of an earlier version knows, which must undo it in any case.
        async with host.network_for(VmPurpose.BOOT) as vm:
            build = RunStepsInput(
                vm=vm,
                disk=disk,
                image=image,
                steps=steps,
                shape=self._shape,
                disk_size_mb=self._config.disk_size_mb,
                timeout_seconds=self._options.image_step_timeout_seconds,
                start_command=commands.start,
                ready_command=commands.ready,
                start_meaning=commands.start_meaning,
                ready_meaning=commands.ready_meaning,
                env=self._config.env,
                force=self._config.force,
                secret_env=self._config.secret_env,
                meaning=self._config.meaning,
                keep_failed=self._config.keep_failed,
            )
            self._send_ahead(host, disk.chain, build)
            return await host.run(
                DiskStepActivities.run_steps, build, f"{len(steps)} steps on {image.digest[:19]}"
            )

    def _commands(self, image: PulledImage) -> Commands:
        return self._config.commands_on(image.base.commands if image.base else None)

    def _has_steps_to_run(self, image: PulledImage) -> bool:
        if self._steps_in_vms():
            return True
        return bool(self._config.steps) and not image.base_reference

    def _needs_vms(self) -> bool:
        """Whether containers of an earlier version's host would do other things."""
        return bool(self._config.secret_env) or self._config.meaning is Meaning.E2B

    def _steps_in_vms(self) -> bool:
        return self._config.has_steps and workflow.patched(STEPS_IN_VMS)

    # ---- The snapshot

    async def boot(self, host: LeasedHost, rootfs: RootfsCheckpoint) -> SnapshotCheckpoint:
        """Find a snapshot of the same inputs, or boot the disk and take one."""
        shape = self._shape
        snapshot = None
        if not self._config.force:
            snapshot = await host.run(
                MicrovmActivities.find_snapshot,
                FindSnapshotInput(scope=host.scope, rootfs=rootfs, shape=shape),
                "look for a snapshot of the same inputs",
            )
        if snapshot is None:
            snapshot = await self._boot_and_snapshot(host, rootfs, shape)
        self._kept.keep(snapshot=snapshot)
        return snapshot

    async def _boot_and_snapshot(
        self, host: LeasedHost, rootfs: RootfsCheckpoint, shape: VmShape
    ) -> SnapshotCheckpoint:
        self._send_ahead(host, rootfs.chain)
        async with host.network_for(VmPurpose.BOOT) as vm:
            await host.run(
                MicrovmActivities.start_vm,
                StartVmInput(vm=vm, rootfs=rootfs, shape=shape),
                f"boot {shape.vcpu_count} vCPU {shape.memory_mb} MiB",
            )
            await host.run(
                MicrovmActivities.wait_until_ready,
                WaitUntilReadyInput(vm=vm, timeout_seconds=self._options.ready_timeout_seconds),
                "wait for the ready command",
            )
            return await host.run(
                MicrovmActivities.snapshot_vm,
                SnapshotVmInput(vm=vm, rootfs=rootfs, shape=shape),
                "snapshot the guest",
            )

    async def verify(self, host: LeasedHost, snapshot: SnapshotCheckpoint) -> Verification:
        """Prove that the snapshot resumes and that its guest answers."""
        async with host.network_for(VmPurpose.VERIFY) as vm:
            verification = await host.run(
                MicrovmActivities.verify_snapshot,
                VerifySnapshotInput(vm=vm, snapshot=snapshot, shape=self._shape),
                "resume the snapshot and ping the guest",
            )
        self._kept.keep(verification=verification)
        return verification

    # ---- The template

    async def upload(
        self,
        host: LeasedHost,
        image: PulledImage,
        rootfs: RootfsCheckpoint,
        snapshot: SnapshotCheckpoint,
    ) -> PublishedTemplate:
        """Send the artifacts and publish: the point of no return, after which it exists."""
        async with self._undos.until_done(self._discard(host)):
            await host.wait_for_aside()
            missing = [name for name in ArtifactName if name not in self._kept.done.uploads]
            if host.lease.whole_steps:
                await self._upload_artifacts(host, rootfs, snapshot, missing)
            else:
                for name in missing:
                    await self._upload_artifact(host, rootfs, snapshot, name)
            published = await self._publish(host, image, rootfs, snapshot)
            self._kept.published = published
        return published

    async def _upload_artifacts(
        self,
        host: LeasedHost,
        rootfs: RootfsCheckpoint,
        snapshot: SnapshotCheckpoint,
        names: Sequence[ArtifactName],
    ) -> None:
        size_mb = sum(snapshot.files[name].allocated_bytes for name in names) / MIB
        uploaded = await host.run(
            ArtifactActivities.upload_artifacts,
            UploadArtifactsInput(
                scope=host.scope, snapshot=snapshot, names=tuple(names), chain=rootfs.chain
            ),
            f"upload {size_mb:.0f} MiB",
        )
        self._kept.keep(uploads={**self._kept.done.uploads, **uploaded})

    async def _upload_artifact(
        self,
        host: LeasedHost,
        rootfs: RootfsCheckpoint,
        snapshot: SnapshotCheckpoint,
        name: ArtifactName,
    ) -> None:
        size_mb = snapshot.files[name].allocated_bytes / MIB
        uploaded = await host.run(
            ArtifactActivities.upload_artifact,
            UploadArtifactInput(scope=host.scope, snapshot=snapshot, name=name, chain=rootfs.chain),
            f"upload {name} {size_mb:.0f} MiB",
        )
        self._kept.keep(uploads={**self._kept.done.uploads, name: uploaded})

    async def _publish(
        self,
        host: LeasedHost,
        image: PulledImage,
        rootfs: RootfsCheckpoint,
        snapshot: SnapshotCheckpoint,
    ) -> PublishedTemplate:
        verification = self._kept.done.verification
        assert verification is not None
        return await host.run(
            ArtifactActivities.publish_template,
            PublishTemplateInput(
                scope=host.scope,
                config=self._config,
                image=self._with_steps(image),
                rootfs=rootfs,
                snapshot=snapshot,
                verification=verification,
                uploads=self._kept.done.uploads,
                timeline=self._telling.timeline.records,
                network=self._shape.network,
            ),
            "publish metadata.json",
        )

    def _with_steps(self, image: PulledImage) -> PulledImage:
        """Return the image with what the steps have made of its config."""
        if image.base_reference:
            return image
        if image.base is None and not self._has_steps_to_run(image):
            return image
        config = config_after(image, self._config.steps, self._config.meaning)
        return image.model_copy(update={"config": config, "tenant": self._config.tenant})

    def _discard(self, host: LeasedHost) -> Undo:
        """Return the undo of all that a lease has sent."""
        undo = Undo("discard upload", lambda: self._discard_upload(host.scope))
        return self._discards.setdefault(host.lease.number, undo)

    async def _discard_upload(self, scope: BuildScope) -> None:
        cancelled = self._telling.state is BuildState.CANCELLING
        discarded = await call(
            UploadUndoActivities.discard_upload,
            DiscardUploadInput(scope=scope, keep_parts=not cancelled),
            queue=WORKFLOW_TASK_QUEUE,  # it must also work when the host is gone
            summary="undo: discard upload",
            options=self._options,
        )
        # Before the verification it is an earlier run's, and this one was reset: it goes on.
        if discarded.published is not None and self._kept.done.verification is not None:
            self._telling.say("the template was published before the build was stopped: it stays")
            self._kept.published = discarded.published
            self._telling.failure = None
        self._kept.keep(uploads={})


def _clean_up(host: LeasedHost) -> Undo:
    return host.undo("clean up rootfs", RootfsActivities.clean_up_rootfs, host.scope)
