"""The microVM of a build: boot, wait, snapshot, and prove that the snapshot resumes."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from pathlib import Path

from temporalio import activity

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint, SnapshotFacts
from activities.contract.errors import (
    CheckpointLostError,
    FilesystemDamagedError,
    HostDiskFullError,
    MachineUnfitError,
    SnapshotNotResumableError,
    TemplateManagerError,
    VmmError,
)
from activities.contract.guest_network import (
    GUEST_ADDRESS,
    GUEST_MAC,
    HOST_ADDRESS,
    HOST_NAME,
    NETMASK,
    TAP,
)
from activities.contract.inputs import (
    FindSnapshotInput,
    SnapshotVmInput,
    StartVmInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.interface import MicrovmActivities
from activities.contract.names import ArtifactName, Step, tenant_mark
from activities.contract.results import UsedBlocks, Verification
from activities.contract.scope import VmRef, VmShape
from activities.contract.units import MIB
from activities.disk.cgroups import Limits
from activities.disk.data_dir import DataDir
from activities.disk.ext4 import check_filesystem, fsck_limits
from activities.disk.room import NO_ROOM_TOLD
from activities.disk.sparse_files import allocated_bytes, copy_private, dig_holes
from activities.microvm.client import NO_LIMITS, DriveLimits, FirecrackerClient
from activities.microvm.clock import ClockReading, ping_until_answered, read_clock
from activities.microvm.console import ConsoleReader, GuestReadiness
from activities.microvm.egress import egress_of
from activities.microvm.guest_kernel import INITRD, initrd_of
from activities.microvm.launching import JAILER, Confinement, Launch
from activities.microvm.resumable import (
    SnapshotTraits,
    cpu_model,
    require_resumable,
    snapshot_format,
    traits_here,
)
from activities.microvm.used_memory import BLOCK_BYTES, read_ahead
from activities.microvm.vm_process import VmProcess, remove_vms_until
from activities.microvm.whole_steps import make_network_if_whole, remove_vm_if_whole
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore, fingerprint
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.vm_requirements import require_host

CLOCK_WARNING_MS = 1000.0
# How much more the clock after a resume may differ from that before the snapshot than the readings
# and the load explain.
CLOCK_FAULT_MS = 250.0
POLL_SECONDS = 0.05
# Raise it when the same inputs give another snapshot than before.
BOOT_VERSION = 4
KERNEL = "kernel"
KERNEL_FILES = ("vmlinux.bin", INITRD)
VMM_THREADS = 100  # Firecracker has a few; the tests' stand-in starts others for its disk


class HostMicrovmActivities(MicrovmActivities):
    """Runs VMs on this host. See `interface` for the contract."""

    def __init__(self, settings: Settings, ledger: LeaseLedger, store: CheckpointStore) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._data_dir = DataDir(settings.data_dir)

    @activity.defn(name="find_snapshot")
    async def find_snapshot(self, find: FindSnapshotInput, /) -> SnapshotCheckpoint | None:
        """Return the snapshot that an earlier build of the same inputs left, if it is whole."""
        async with running_step(self._settings, self._ledger, find.scope, Step.BOOT) as running:
            return await running.in_thread(self._find, find, running)

    @activity.defn(name="start_vm")
    async def start_vm(self, start: StartVmInput, /) -> None:
        """Start Firecracker in the VM's netns and boot a private copy of the rootfs."""
        async with self._running(start.vm, Step.BOOT) as running:
            await running.in_thread(make_network_if_whole, start.vm, self._data_dir)
            await running.in_thread(self._start, start, running)

    @activity.defn(name="wait_until_ready")
    async def wait_until_ready(self, wait: WaitUntilReadyInput, /) -> None:
        """Follow the serial console until the guest says that it is ready."""
        async with self._running(wait.vm, Step.BOOT) as running:
            await running.in_thread(self._wait, wait, running)

    @activity.defn(name="snapshot_vm")
    async def snapshot_vm(self, snapshot: SnapshotVmInput, /) -> SnapshotCheckpoint:
        """Pause, snapshot, kill and wait for the VM; keep disk, memory and state."""
        attempt = activity.info().attempt
        async with self._running(snapshot.vm, Step.BOOT) as running:
            made = await running.in_thread(self._snapshot, snapshot, running, attempt)
            await running.in_thread(remove_vm_if_whole, snapshot.vm, self._data_dir, running)
            return made

    @activity.defn(name="verify_snapshot")
    async def verify_snapshot(self, verify: VerifySnapshotInput, /) -> Verification:
        """Resume the snapshot in a fresh VM on a copy of the disk; it must answer a ping."""
        async with self._running(verify.vm, Step.VERIFY) as running:
            await running.in_thread(make_network_if_whole, verify.vm, self._data_dir)
            verification = await running.in_thread(self._verify, verify, running)
            await running.in_thread(remove_vm_if_whole, verify.vm, self._data_dir, running)
            return verification

    @activity.defn(name="kill_vm")
    async def kill_vm(self, vm: VmRef, /) -> None:
        """Kill the VM and those of its earlier leases, and remove their directories."""
        await asyncio.to_thread(remove_vms_until, vm, self._data_dir)

    def _running(self, vm: VmRef, step: Step) -> AbstractAsyncContextManager[RunningStep]:
        return running_step(self._settings, self._ledger, vm.scope, step)

    # ---- Boot, unless that has been done

    def _find(self, find: FindSnapshotInput, running: RunningStep) -> SnapshotCheckpoint | None:
        require_host(self._settings, find.shape)
        key = snapshot_fingerprint(self._settings, find.rootfs, find.shape, find.scope.tenant)
        return self._store.find(SnapshotCheckpoint, key, find.scope.build_id, running.check)

    def _start(self, start: StartVmInput, running: RunningStep) -> None:
        firecracker = require_host(self._settings, start.shape)
        vm = VmProcess(self._data_dir.vm(start.vm.name))
        if vm.is_running() and _runs(vm):
            running.log.info("the VM is already running: taking it up again")
            return
        vm.remove()
        rootfs = self._store.require(start.rootfs, start.vm.scope.build_id)
        vm.make()
        _copy(
            rootfs / ArtifactName.ROOTFS,
            vm.files / ArtifactName.ROOTFS,
            running.check,
            _teller(running),
        )
        running.check()
        running.progress("starting the VMM")
        launch = launch_of(self._settings, firecracker, start.shape)
        kernel = self._settings.kernel_path(start.shape.kernel_version)
        egress = egress_of(self._settings, start.shape.network, running.check)
        own = (ArtifactName.ROOTFS,)
        launch = replace(launch, own=own, shared=kernel_files(kernel), egress=egress)
        tell_limits(running, vm.start(launch, running.check))
        self._configure(vm, start.shape)
        running.log.info(
            f"VM started: {start.shape.vcpu_count} vCPU, {start.shape.memory_mb} MiB, "
            f"kernel {start.shape.kernel_version}, network {start.shape.network}"
        )

    def _configure(self, vm: VmProcess, shape: VmShape) -> None:
        with vm.client() as client:
            path = self._settings.kernel_path(shape.kernel_version)
            set_boot_source(vm, client, path, kernel_arguments(self._settings))
            client.root_drive(vm.inside(ArtifactName.ROOTFS), drive_limits(self._settings))
            client.network_interface(GUEST_MAC, TAP)
            client.metadata_service()
            client.machine_config(shape.vcpu_count, shape.memory_mb)
            client.entropy()
            client.start()

    # ---- Wait

    def _wait(self, wait: WaitUntilReadyInput, running: RunningStep) -> None:
        vm = VmProcess(self._data_dir.vm(wait.vm.name))
        console, guest = ConsoleReader(vm.console), GuestReadiness(running.log)
        # By the VM's own age: a worker that took it up again does not start the clock anew.
        deadline = _started_at(vm) + wait.timeout_seconds
        try:
            while not guest.ready:
                running.check()
                ended = vm.has_ended()  # before reading: what it said last is then read
                before = console.position
                for line in console.lines():
                    guest.hear(line)
                guest.tell_parts()
                console.remember()
                running.progress("waiting for the guest", guest.attempts, 0, "attempts")
                if guest.failure is not None:
                    raise guest.failure
                if console.position != before or guest.ready:
                    continue
                if ended:
                    raise guest.ended(vm.exit_reason(), vm.log_tail())
                if time.time() > deadline:
                    raise guest.timed_out(wait.timeout_seconds)
                time.sleep(POLL_SECONDS)
        finally:
            if lost := str(console.lost()):
                running.log.warn(lost)

    # ---- Snapshot

    def _snapshot(
        self, snapshot: SnapshotVmInput, running: RunningStep, attempt: int
    ) -> SnapshotCheckpoint:
        scope = snapshot.vm.scope
        key = snapshot_fingerprint(self._settings, snapshot.rootfs, snapshot.shape, scope.tenant)
        vm = VmProcess(self._data_dir.vm(snapshot.vm.name))
        if not vm.is_running():
            return self._published_before(key, snapshot, running)
        facts = self._take(vm, snapshot, running)
        with self._store.making(Step.BOOT, key, scope, attempt, running.check) as work:
            other = self._kept(key, snapshot, running)
            if other is not None:  # another build of the same was quicker, and may be using it
                running.log.info("another build's snapshot of the same inputs is taken")
                return other
            for name in ArtifactName:
                vm.take_back(name).rename(work / name)
            running.progress("giving back empty memory")
            dig_holes(work / ArtifactName.MEMFILE, running.check)  # Firecracker writes every page
            clean = self._is_clean(work / ArtifactName.ROOTFS, running)
            running.progress("hashing the snapshot")
            made = SnapshotCheckpoint(
                fingerprint=key,
                host=self._settings.host,
                facts=facts.model_copy(update={"fsck_clean": clean}),
            )
            return self._store.publish(
                work, made, scope, names=tuple(ArtifactName), check=running.check
            )

    def _is_clean(self, rootfs: Path, running: RunningStep) -> bool:
        """Check the disk as the snapshot has it: synced by the guest, but still mounted."""
        limits = fsck_limits(self._settings.disk_check_seconds)
        running.progress(f"checking {ArtifactName.ROOTFS}")
        try:
            check_filesystem(rootfs, running.check, limits=limits)
        except FilesystemDamagedError as error:
            # Files that are deleted but open are told as errors, and are none to the resumed guest.
            running.log.warn("e2fsck of the mounted disk: " + "; ".join(error.log_tail[-3:]))
            return False
        return True

    def _kept(
        self, key: str, snapshot: SnapshotVmInput, running: RunningStep
    ) -> SnapshotCheckpoint | None:
        build_id = snapshot.vm.scope.build_id
        found = self._store.find(SnapshotCheckpoint, key, build_id, running.check)
        return found.model_copy(update={"reused": False}) if found else None

    def _published_before(
        self, key: str, snapshot: SnapshotVmInput, running: RunningStep
    ) -> SnapshotCheckpoint:
        """An earlier attempt may have published and not been heard; else the VM is lost."""
        found = self._kept(key, snapshot, running)
        if found is None:
            raise CheckpointLostError("the booted VM is gone", step=Step.BOOT)
        return found

    def _take(
        self, vm: VmProcess, snapshot: SnapshotVmInput, running: RunningStep
    ) -> SnapshotFacts:
        running.progress("taking the snapshot")
        with vm.client() as client:
            version, is_paused = client.version(), client.state() == "Paused"
            # A paused guest has been read by the attempt that paused it, which nobody has heard of.
            clock = None if is_paused else read_clock(vm.name, running.check)
            taken = time.time()  # before: the guest's clock stops while the call is under way
            if drive_limits(self._settings) != NO_LIMITS:
                client.lift_root_drives_limits()  # they are the build hosts', not the template's
            if not is_paused:
                client.pause()
            _write_snapshot(vm, client)
        took = time.time() - taken
        firecracker = self._settings.firecracker_path(snapshot.shape.firecracker_version)
        confined = vm.held()
        vm.kill()
        running.log.info(f"snapshot taken in {took * 1000:.0f} ms")
        return SnapshotFacts(
            vmm_name="Firecracker",
            vmm_version=version,
            snapshot_format=snapshot_format(firecracker, version),
            architecture=platform.machine(),
            cpu_model=cpu_model(),
            snapshot_at=taken,
            boot_seconds=round(taken - _started_at(vm), 3),
            kernel_version=snapshot.shape.kernel_version,
            clock_skew_ms=round(clock.skew_ms, 1) if clock else None,
            clock_error_ms=round(clock.error_ms, 1) if clock else 0,
            jailer=confined.jailer,
            seccomp=confined.seccomp,
        )

    # ---- Verify

    def _verify(self, verify: VerifySnapshotInput, running: RunningStep) -> Verification:
        firecracker = require_host(self._settings, verify.shape)
        snapshot = self._store.require(verify.snapshot, verify.vm.scope.build_id)
        _require_still_resumable(verify.snapshot.facts, firecracker)
        vm = VmProcess(self._data_dir.vm(verify.vm.name))
        vm.remove()
        vm.make()
        try:
            launch = launch_of(self._settings, firecracker, verify.shape)
            resumed = resume(
                vm,
                snapshot,
                launch,
                running.check,
                _teller(running),
                seconds=self._settings.resume_seconds,
            )
            clock = read_clock(vm.name, running.check)
            require_right_clock(resumed, clock, verify.snapshot.facts)
            used = vm.used_memory(snapshot / ArtifactName.MEMFILE, running.check)
        except SnapshotNotResumableError as error:
            self._store.condemn(verify.snapshot)  # a retry must boot again, not find this one
            error.log_tail = tuple(vm.tail())
            raise
        finally:
            vm.remove()
        since = resumed.at - verify.snapshot.facts.snapshot_at
        _tell(running, resumed.answer_ms, clock, since)
        _tell_used(running, used)
        return Verification(
            resume_ms=round(resumed.answer_ms, 1),
            load_ms=round(resumed.load_ms, 1),
            clock_skew_ms=round(clock.skew_ms, 1) if clock else 0.0,
            seconds_since_snapshot=round(since, 3),
            prefetch=used,
        )


class Resumed:
    """How long resuming took. `at` is the wall clock when the guest answered, in seconds."""

    def __init__(self, load_ms: float, answer_ms: float, clock_set: bool) -> None:
        self.clock_set = clock_set
        self.load_ms = load_ms
        self.answer_ms = answer_ms
        self.at = time.time()


Tell = Callable[[str, int, int], None]
"""Told what is done now, the bytes of it that are done, and of how many; 0 of 0 is not known."""


def launch_of(settings: Settings, firecracker: Path, shape: VmShape) -> Launch:
    """Return what a VMM for that shape is started with on a host."""
    limits = Limits(
        memory_mb=shape.memory_mb + settings.vm_overhead_mb,
        cpus=shape.vcpu_count + 1,  # one for what the VMM itself does
        processes=shape.vcpu_count + VMM_THREADS,
    )
    first = settings.vm_first_user
    return Launch(
        firecracker,
        limits,
        users=range(first, first + settings.vm_users),
        console_bytes=settings.max_console_mb * MIB,
        jailer=jailer_of(settings, firecracker),
        hidden=(settings.data_dir.resolve(),),
    )


def jailer_of(settings: Settings, firecracker: Path) -> Path | None:
    """Return the jailer that a Firecracker is started with, if it is to be and is there."""
    jailer = firecracker.with_name(JAILER)
    return jailer if settings.use_jailer and jailer.exists() else None


def resume(
    vm: VmProcess,
    template: Path,
    launch: Launch,
    check: Callable[[], None],
    tell: Tell = lambda what, done, total: None,
    *,
    seconds: float,
    prefetch: Sequence[UsedBlocks] = (),
) -> Resumed:
    """Resume the snapshot in `template` in the VM's own directory and netns.

    The disk is a private copy; memory and state are only read. The guest has so many `seconds` to
    answer a ping. `tell` is told what it does; what `prefetch` names of the memory the kernel reads
    meanwhile. Raises SnapshotNotResumableError; VmmError when the VMM does not even start, which is
    not the snapshot's fault.
    """
    read_ahead(template / ArtifactName.MEMFILE, prefetch)
    _copy(template / ArtifactName.ROOTFS, vm.files / ArtifactName.ROOTFS, check, tell)
    read: dict[str, Path] = {
        name: template / name for name in (ArtifactName.MEMFILE, ArtifactName.SNAPFILE)
    }
    vm.start(replace(launch, own=(ArtifactName.ROOTFS,), shared=read), check)
    tell("loading the snapshot", 0, 0)
    began = time.monotonic()
    try:
        with vm.client() as client:
            # Firecracker has the field for kvm-clock alone, which is x86's.
            on_x86 = platform.machine() == "x86_64"
            files = (vm.inside(ArtifactName.SNAPFILE), vm.inside(ArtifactName.MEMFILE))
            clock_set = client.load(*files, set_clock=on_x86)
    except VmmError as error:
        raise SnapshotNotResumableError(f"the snapshot does not load: {error.message}") from error
    load_ms = (time.monotonic() - began) * 1000
    tell("waiting for the resumed guest to answer", 0, 0)
    ping_until_answered(vm.name, seconds, check)
    return Resumed(load_ms, (time.monotonic() - began) * 1000, clock_set)


def drive_limits(settings: Settings) -> DriveLimits:
    """Return how fast a guest may use each of its disks on a host."""
    return DriveLimits(settings.drive_mb_per_second * MIB, settings.drive_ops_per_second)


def kernel_arguments(settings: Settings, init: str = "/.template/init") -> str:
    """Return the guest's kernel command line."""
    network = f"{GUEST_ADDRESS}::{HOST_ADDRESS}:{NETMASK}:{HOST_NAME}:eth0:off"
    own = settings.kernel_arguments.strip()
    return " ".join(
        (
            "console=ttyS0",
            "reboot=k panic=1 pci=off",  # Firecracker's: the VMM ends when the guest does
            "i8042.noaux i8042.nomux i8042.dumbkbd",  # saves half a second of probing
            "random.trust_cpu=on",
            "clocksource=kvm-clock",  # the only one that a VMM can move on at a resume
            # Its ten thousand files take 9 MiB of each guest's memory, and so of each snapshot.
            "initcall_blacklist=tracer_init_tracefs",
            "quiet loglevel=3",
            *([own] if own else []),
            f"ip={network}:{settings.dns_server}",
            f"init={init}",
            "systemd.firstboot=off systemd.condition-first-boot=no",  # never waits for input
            # By its name it says what fails and, after some seconds, what it waits for.
            "systemd.show_status=auto systemd.status_unit_format=name",
            "fstab=no",  # as in a container: the devices that it names are not there
        )
    )


def snapshot_fingerprint(
    settings: Settings, rootfs: RootfsCheckpoint, shape: VmShape, tenant: str
) -> str:
    """Return the key of the boot step: disk, shape, kernel, VMM and CPU, and always the tenant: in
    a memory are the keys that an image has made at its first start."""
    mark = tenant_mark(tenant)
    kernel = settings.kernel_path(shape.kernel_version)
    initrd = initrd_of(kernel)
    return fingerprint(
        Step.BOOT,
        **({"tenant": mark} if mark else {}),
        version=BOOT_VERSION,
        rootfs=rootfs.fingerprint,
        shape=shape.model_dump(mode="json"),
        kernel=_identity(kernel),
        **({"initrd": _identity(initrd)} if initrd else {}),
        firecracker=_identity(settings.firecracker_path(shape.firecracker_version)),
        arguments=kernel_arguments(settings),
        cpu=cpu_model(),
    )


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _runs(vm: VmProcess) -> bool:
    """Whether the guest has been booted, and not been paused for a snapshot that nobody has: a
    paused one says nothing, so nobody would hear that it is ready."""
    try:
        with vm.client() as client:
            return client.state() == "Running"
    except (TemplateManagerError, OSError):
        return False


def _started_at(vm: VmProcess) -> float:
    """Return when the VM was started, in seconds of the wall clock. Raises CheckpointLostError."""
    try:
        return (vm.directory / "vmm.json").stat().st_mtime
    except FileNotFoundError:
        raise CheckpointLostError("the booted VM is gone", step=Step.BOOT) from None


def set_boot_source(
    vm: VmProcess, client: FirecrackerClient, vmlinux: Path, arguments: str
) -> None:
    """Tell the VMM which of its files are the kernel and, where there is one, its initrd."""
    kernel, initrd = (vm.inside(f"{KERNEL}/{name}") for name in KERNEL_FILES[:2])
    client.boot_source(kernel, arguments, initrd if initrd_of(vmlinux) is not None else None)


def kernel_files(kernel: Path) -> dict[str, Path]:
    """Return the kernel and what belongs to it, by their names in the VM's files."""
    there = [name for name in KERNEL_FILES if (kernel.parent / name).exists()]
    return {f"{KERNEL}/{name}": kernel.parent / name for name in there}


def tell_limits(running: RunningStep, confinement: Confinement) -> None:
    """Warn where what confines a VMM has no limits."""
    if confinement.unlimited:
        running.log.warn(f"the VMM's limits do not hold: {confinement.unlimited}")


def _teller(running: RunningStep) -> Tell:
    return lambda what, done, total: running.progress(what, done, total, "bytes" if total else "")


def _copy(source: Path, target: Path, check: Callable[[], None], tell: Tell) -> None:
    what, total = f"copying {source.name}", allocated_bytes(source)
    tell(what, 0, total)
    try:
        copy_private(source, target, check, lambda done: tell(what, done, max(done, total)))
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise HostDiskFullError(
            f"cannot copy {source.name} ({source.stat().st_size} bytes, {free} free): {error}"
        ) from error


def _require_still_resumable(facts: SnapshotFacts, firecracker: Path) -> None:
    """Raise CheckpointLostError when the host has changed since: it boots anew then."""
    made = SnapshotTraits(
        facts.vmm_version, facts.snapshot_format, facts.architecture, facts.cpu_model
    )
    try:
        require_resumable(made, traits_here(firecracker), firecracker)
    except MachineUnfitError as error:
        raise CheckpointLostError(error.message, step=Step.BOOT) from error


def _write_snapshot(vm: VmProcess, client: FirecrackerClient) -> None:
    """Have the VMM write it. Of one that fails nothing stays: half a memory is large, too."""
    vm.give(ArtifactName.SNAPFILE, ArtifactName.MEMFILE)
    try:
        client.snapshot(vm.inside(ArtifactName.SNAPFILE), vm.inside(ArtifactName.MEMFILE))
    except VmmError as error:
        for name in (ArtifactName.SNAPFILE, ArtifactName.MEMFILE):
            with suppress(FileNotFoundError):  # the VMM writes to the same file the next time
                os.truncate(vm.files / name, 0)
        if NO_ROOM_TOLD not in error.message:
            raise
        raise HostDiskFullError(f"there is no room for the snapshot: {error.message}") from error


def require_right_clock(
    resumed: Resumed, clock: ClockReading | None, before: SnapshotFacts
) -> None:
    """Raise SnapshotNotResumableError when the VMM has not moved the guest's clock on.

    Only one that was told to can be blamed, and only for what it has changed: a guest whose clock
    was off before the snapshot is as much off after it. When within the load it is moved nobody
    says.
    """
    if not resumed.clock_set or clock is None or before.clock_skew_ms is None:
        return
    change_ms = clock.skew_ms - before.clock_skew_ms
    error_ms = before.clock_error_ms + clock.error_ms + resumed.load_ms
    if abs(change_ms) > CLOCK_FAULT_MS + error_ms:
        raise SnapshotNotResumableError(
            f"the resumed guest's clock is {change_ms / 1000:+.1f} s off although Firecracker was "
            "told to set it: the guest kernel needs the clock source kvm-clock"
        )


def _tell_used(running: RunningStep, used: Sequence[UsedBlocks]) -> None:
    if used:
        size = sum(stretch.length for stretch in used) * BLOCK_BYTES
        running.log.info(f"the guest had used {size / MIB:.1f} MiB of its memory by then")


def _tell(running: RunningStep, answer_ms: float, clock: ClockReading | None, since: float) -> None:
    running.log.info(f"the snapshot resumes: answered a ping after {answer_ms:.0f} ms")
    if clock is None:
        running.log.warn("the guest does not answer ICMP timestamps: its clock is not known")
    elif abs(clock.skew_ms) > CLOCK_WARNING_MS:
        running.log.warn(
            f"the resumed guest's clock is {clock.skew_ms / 1000:+.1f} s off, {since:.1f} s after "
            "the snapshot: set it after a resume"
        )
