"""Runs the steps of a request, each in a VM of its own on the disk that the one before has left.

What a step leaves is a checkpoint, keyed by all that went before it: a changed step is run again
and those after it, and whatever dies in the middle of a step loses that step alone. A VM a step,
and not one for all, because then a step begins as the boot of its disk, whether the one before was
run just now or years ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from temporalio import activity

from activities.contract.checkpoints import RootfsCheckpoint, RootfsFacts
from activities.contract.errors import (
    CheckpointLostError,
    ImageStepError,
    ProvisioningError,
    RootfsTooLargeError,
)
from activities.contract.image_steps import Add, Copy, Run
from activities.contract.inputs import RunStepsInput
from activities.contract.interface import DiskStepActivities
from activities.contract.names import ArtifactName, Step, tenant_mark
from activities.contract.network_policy import NO_NETWORK
from activities.contract.step_context import config_after
from activities.contract.units import MIB
from activities.disk import ext4
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.disk.tree_content import BLOCK
from activities.instructions.plan import Work, chain_of, disk_key, plan, values_of
from activities.instructions.step_drive import DRIVE, StepFiles, make_drive
from activities.microvm.egress import Egress, egress_of
from activities.microvm.microvm import tell_limits
from activities.microvm.step_vm import (
    StepGuestEnded,
    StepTalk,
    StepTimedOut,
    follow_step,
    put_secrets,
    start_step_vm,
)
from activities.microvm.vm_process import VmProcess
from activities.microvm.whole_steps import make_network_if_whole, remove_vm_if_whole
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.rootfs.guest_files import agent_version
from activities.rootfs.rootfs import unstarted
from activities.step.checkpoints import CheckpointStore, FailedStep, copy_disk
from activities.step.layer_disks import LayerDisks
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.vm_requirements import require_host
from activities.step.work_directories import working_in
from activities.store.bucket import Bucket
from activities.store.files import fetch_files

FINISH_SECONDS = 300.0
GZIP = b"\x1f\x8b"


class VmDiskStepActivities(DiskStepActivities):
    """Runs steps in VMs of this host. See `interface` for the contract."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        store: CheckpointStore,
        bucket: Bucket,
        sealer: Sealer,
    ) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store
        self._bucket = bucket
        self._sealer = sealer
        self._layers = LayerDisks(settings, bucket, store)
        self._room = Room((settings.data_dir,), settings.min_free_disk_mb * MIB)

    @activity.defn(name="run_steps")
    async def run_steps(self, build: RunStepsInput, /) -> RootfsCheckpoint:
        """Run those steps that no checkpoint is left of, then make the disk a template's."""
        attempt = activity.info().attempt
        scope = build.vm.scope
        async with running_step(self._settings, self._ledger, scope, Step.ROOTFS) as running:
            await running.in_thread(make_network_if_whole, build.vm, self._data_dir)
            disk = await running.in_thread(self._run, running, build, attempt)
            await running.in_thread(remove_vm_if_whole, build.vm, self._data_dir, running)
            return disk

    def _run(self, running: RunningStep, build: RunStepsInput, attempt: int) -> RootfsCheckpoint:
        self._store.forget_failed(build.vm.scope.build_id)
        todo = plan(self._settings, build)
        disk, done = self._last_left(running, build, todo, attempt)
        for work in todo[:done]:
            with running.step_of_request(work.number):
                running.log.info(f"{work.name}: an earlier build's is used again")
        if any(isinstance(work.step, Run) for work in todo[done:]):
            running.log.info(f"network of the steps: {build.shape.network}")
        if not build.start_command:
            running.log.info(unstarted(config_after(build.image, build.steps, build.meaning)))
        for number, work in enumerate(todo[done:], done + 1):
            running.progress(f"{number} of {len(todo)}: {work.name}")
            with running.step_of_request(work.number):
                disk = self._do(running, build, disk, work, attempt)
        chain = chain_of(build, todo)
        return disk.model_copy(update={"reused": done == len(todo), "chain": chain})

    def _last_left(
        self, running: RunningStep, build: RunStepsInput, todo: Sequence[Work], attempt: int
    ) -> tuple[RootfsCheckpoint, int]:
        """Return the disk to begin with, and how many pieces of work it has behind it."""
        disks = (*build.disk.chain, *(disk_key(build, work) for work in todo))
        for left in range(len(todo)):
            done, chain = len(todo) - left, disks[: len(disks) - left]
            found = self._find(running, build, chain[-1].fingerprint)
            found = found or self._layers.bring(chain, build.vm.scope, attempt, running)
            if found is not None:
                return found, done
        return build.disk, 0

    def _find(
        self, running: RunningStep, build: RunStepsInput, key: str
    ) -> RootfsCheckpoint | None:
        build_id = build.vm.scope.build_id
        return self._store.find(RootfsCheckpoint, key, build_id, running.check)

    def _do(
        self,
        running: RunningStep,
        build: RunStepsInput,
        disk: RootfsCheckpoint,
        work: Work,
        attempt: int,
    ) -> RootfsCheckpoint:
        scope, check = build.vm.scope, running.check
        with self._store.making(Step.ROOTFS, work.key, scope, attempt, check) as place:
            other = self._find(running, build, work.key)
            if other is not None:  # another build of the same was quicker
                running.log.info(f"{work.name}: another build's is taken")
                return other
            running.log.info(work.name)
            source = self._require(build, disk) / ArtifactName.ROOTFS
            facts = self._in_vm(running, build, source, work, place / ArtifactName.ROOTFS)
            made = RootfsCheckpoint(fingerprint=work.key, host=self._settings.host, facts=facts)
            return self._store.publish(
                place, made, scope, names=(ArtifactName.ROOTFS,), check=check
            )

    def _require(self, build: RunStepsInput, disk: RootfsCheckpoint) -> Path:
        try:
            return self._store.require(disk, build.vm.scope.build_id)
        except CheckpointLostError as error:
            if build.image.base is None or disk != build.disk:
                raise
            raise CheckpointLostError(error.message, step=Step.PULL) from error

    # ---- In a VM

    def _in_vm(
        self, running: RunningStep, build: RunStepsInput, source: Path, work: Work, target: Path
    ) -> RootfsFacts:
        firecracker = require_host(self._settings, build.shape)
        vm = VmProcess(self._data_dir.vm(build.vm.name))
        vm.remove()
        vm.make()
        talk = StepTalk(running.log, work.step.kind if work.step else "template")
        shape = build.shape.model_copy(update={"memory_mb": self._memory_mb(build)})
        try:
            grows = self._copy_disk(running, build, source, vm.files / ArtifactName.ROOTFS)
            self._put_drive(running, build, work, grows, vm.files / DRIVE)
            if build.secret_env and isinstance(work.step, Run):
                put_secrets(vm, self._open_secrets(running, build))
            egress = self._egress(running, build, work)
            started = start_step_vm(
                vm, self._settings, firecracker, shape, running.check, egress=egress
            )
            tell_limits(running, started)
            try:
                self._follow(running, build, work, vm, talk)
            except ImageStepError as error:
                self._keep_failed(running, build, work, vm, error)
                raise
            vm.kill()
            vm.take_back(ArtifactName.ROOTFS).rename(target)
        finally:
            vm.remove()
        return self._facts(running, target, talk)

    def _keep_failed(
        self,
        running: RunningStep,
        build: RunStepsInput,
        work: Work,
        vm: VmProcess,
        error: ImageStepError,
    ) -> None:
        """Keep the disk as the step has left it, if that was asked for; say how to look at it."""
        if not build.keep_failed:
            return
        scope, context = build.vm.scope, work.context
        user = work.step.user if isinstance(work.step, Run) and work.step.user else context.user
        failed = FailedStep(
            what=error.message,
            user=user,
            working_dir=context.working_dir,
            variables=context.variables,
            # Who looks at it needs no network.
            shape=build.shape.model_copy(
                update={"memory_mb": self._memory_mb(build), "network": NO_NETWORK}
            ),
        )
        vm.kill()
        running.check()
        self._store.keep_failed(vm.take_back(ArtifactName.ROOTFS), failed, scope)
        error.hint = (
            f"Look at its disk on host {self._settings.host}: template-manager run --disk "
            f"{scope.build_id}. {error.hint}"
        )

    def _egress(self, running: RunningStep, build: RunStepsInput, work: Work) -> Egress | None:
        """Return what a step may reach: nothing, unless it runs a command of the request."""
        if not isinstance(work.step, Run):
            return None
        return egress_of(self._settings, build.shape.network, running.check)

    def _facts(self, running: RunningStep, disk: Path, talk: StepTalk) -> RootfsFacts:
        return RootfsFacts(
            size_mb=disk.stat().st_size // MIB,
            free_mb=ext4.available_blocks(disk) * BLOCK // MIB,
            files=ext4.used_inodes(disk),
            init=talk.facts.get("init", ""),
            agent_version=agent_version(self._settings, running.check),
        )

    def _open_secrets(self, running: RunningStep, build: RunStepsInput) -> dict[str, str]:
        scope, opened = build.vm.scope, dict[str, str]()
        for name, sealed in build.secret_env.items():
            only_for = SealedFor(scope.build_id, "", tenant_mark(scope.tenant), name)
            opened[name] = self._sealer.open(sealed, only_for)
            running.log.redact(opened[name])
        return opened

    def _memory_mb(self, build: RunStepsInput) -> int:
        return max(build.shape.memory_mb, self._settings.image_step_memory_mb)

    def _copy_disk(
        self, running: RunningStep, build: RunStepsInput, source: Path, disk: Path
    ) -> bool:
        """Copy the disk, with as much free room as the template is to have; whether it grew."""
        copy_disk(source, disk, running.check)
        lacking = build.disk_size_mb * MIB - ext4.available_blocks(disk) * BLOCK
        if lacking <= 0:
            return False
        size_bytes = disk.stat().st_size + _whole_mib(lacking * 33 // 32)
        if size_bytes > self._settings.max_rootfs_mb * MIB:
            raise RootfsTooLargeError(
                f"the root file system would be {size_bytes // MIB} MiB, with "
                f"{build.disk_size_mb} MiB of them free; the limit is "
                f"{self._settings.max_rootfs_mb} MiB"
            )
        with disk.open("rb+") as file:
            file.truncate(size_bytes)
        return True

    def _put_drive(
        self, running: RunningStep, build: RunStepsInput, work: Work, grows: bool, target: Path
    ) -> None:
        with working_in(self._data_dir, build.vm.scope, "step", work.key[:12]) as place:
            tar, values, unpacked_mb = None, values_of(build, work), 0
            if isinstance(work.step, Copy | Add):
                tar = place / "files.tar"
                sha256, most = work.step.files_sha256, self._settings.max_files_mb * MIB
                tenant = build.vm.scope.tenant
                fetch_files(
                    self._bucket,
                    sha256,
                    tar,
                    running.check,
                    tenant=tenant,
                    most_bytes=most,
                    room=self._room,
                )
                if _is_gzip(tar):  # more than the template has room for it cannot take anyway
                    unpacked_mb = build.disk_size_mb
            what = work.step.kind if work.step else "finish"
            if build.keep_failed:
                values["disk-is-kept"] = ""
            running.check()
            files = StepFiles(what, values, tar, unpacked_mb, grows)
            made = make_drive(place, self._settings, files, self._room, running.check)
            made.rename(target)

    def _follow(
        self, running: RunningStep, build: RunStepsInput, work: Work, vm: VmProcess, talk: StepTalk
    ) -> None:
        seconds = build.timeout_seconds if work.step else FINISH_SECONDS
        try:
            follow_step(vm, talk, seconds, partial(self._check, running, work))
        except StepTimedOut as error:
            raise _failed(work, str(error), talk) from None
        except StepGuestEnded as error:
            raise _failed(work, f"the guest has ended: {error}", talk) from None
        if talk.refused:
            raise _failed(work, talk.refused, talk)
        if talk.exit_code:
            raise _failed(work, self._why(build, talk), talk)

    def _check(self, running: RunningStep, work: Work) -> None:
        """Go on or not: what files unpack to is known when they have been unpacked."""
        running.check()
        if isinstance(work.step, Copy | Add):
            self._room.require(f"unpack the files of {work.name}")

    def _why(self, build: RunStepsInput, talk: StepTalk) -> str:
        limits = {
            "memory": f"ran out of memory ({self._memory_mb(build)} MiB)",
            "disk": f"ran out of disk ({build.disk_size_mb} MiB were free)",
            "processes": "ran out of processes (4096 at a time)",
        }
        code = f"ended with exit code {talk.exit_code}"
        return f"{limits[talk.ran_out_of]}, {code}" if talk.ran_out_of else code


def _failed(work: Work, why: str, talk: StepTalk) -> Exception:
    kind = ImageStepError if work.step else ProvisioningError
    message = talk.log.redaction.apply(f"{work.name}: {why}" if work.step else why)
    return kind(message, log_tail=[*talk.tail])


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _whole_mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB) * MIB + MIB
