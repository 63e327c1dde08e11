"""A host's activities on real VMs, and the builds that a test makes with them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from devstack.environment import FIRECRACKER_VERSION, environment
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.inputs import (
    SnapshotVmInput,
    StartVmInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.names import VmPurpose
from activities.contract.results import PulledImage, Verification
from activities.contract.scope import BuildScope, VmRef, VmShape
from activities.disk.data_dir import DataDir
from activities.microvm.microvm import HostMicrovmActivities, launch_of, resume
from activities.microvm.network import NetnsNetworkActivities
from activities.microvm.vm_process import VmProcess
from activities.step.vm_requirements import require_host
from tests.support.host_resources import HostResources

OUT = "@tm@ out"


class VmHost:
    """One host's activities, and the builds that a test has made with them."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.settings = bench.settings
        self.networks = NetnsNetworkActivities(bench.settings, bench.ledger)
        self.vms = HostMicrovmActivities(bench.settings, bench.ledger, bench.store)
        self.shape = VmShape(
            memory_mb=256,
            vcpu_count=1,
            kernel_version=environment().kernel_version or "none",
            firecracker_version=FIRECRACKER_VERSION,
        )
        self.ready_seconds = 60.0
        self._made: list[VmRef] = []

    def vm(self, scope: BuildScope | None = None, purpose: VmPurpose = VmPurpose.BOOT) -> VmRef:
        made = VmRef(scope=scope or self.bench.scope(), purpose=purpose)
        self._made.append(made)
        return made

    def whole(self, vm: VmRef) -> VmRef:
        """Return it as a workflow names it that has whole steps done."""
        lease = vm.scope.lease.model_copy(update={"whole_steps": True})
        return vm.model_copy(update={"scope": vm.scope.model_copy(update={"lease": lease})})

    def process(self, vm: VmRef) -> VmProcess:
        return VmProcess(DataDir(self.settings.data_dir).vm(vm.name))

    async def rootfs(self, image: PulledImage, vm: VmRef, **more: Any) -> RootfsCheckpoint:
        memory = {"memory_mb": self.shape.memory_mb, "ready_timeout_seconds": self.ready_seconds}
        asked = self.bench.rootfs_input(image, vm.scope, **(memory | more))
        made: RootfsCheckpoint = await run(self.bench.rootfs.build_rootfs, asked)
        return made

    async def start(self, vm: VmRef, rootfs: RootfsCheckpoint, **shape: Any) -> None:
        await run(self.networks.set_up_network, vm)
        asked = StartVmInput(vm=vm, rootfs=rootfs, shape=self.shape.model_copy(update=shape))
        await run(self.vms.start_vm, asked)

    async def wait(self, vm: VmRef, timeout_seconds: float | None = None) -> None:
        seconds = timeout_seconds or self.ready_seconds
        await run(self.vms.wait_until_ready, WaitUntilReadyInput(vm=vm, timeout_seconds=seconds))

    async def boot(self, image: PulledImage, **more: Any) -> tuple[VmRef, RootfsCheckpoint]:
        vm = self.vm()
        rootfs = await self.rootfs(image, vm, **more)
        await self.start(vm, rootfs)
        await self.wait(vm)
        return vm, rootfs

    async def snapshot(self, vm: VmRef, rootfs: RootfsCheckpoint) -> SnapshotCheckpoint:
        asked = SnapshotVmInput(vm=vm, rootfs=rootfs, shape=self.shape)
        made: SnapshotCheckpoint = await run(self.vms.snapshot_vm, asked)
        return made

    async def verify(self, vm: VmRef, snapshot: SnapshotCheckpoint) -> Verification:
        verifying = self.vm(vm.scope, VmPurpose.VERIFY)
        await run(self.networks.set_up_network, verifying)
        asked = VerifySnapshotInput(vm=verifying, snapshot=snapshot, shape=self.shape)
        found: Verification = await run(self.vms.verify_snapshot, asked)
        return found

    @asynccontextmanager
    async def resumed(self, vm: VmRef, snapshot: SnapshotCheckpoint) -> AsyncIterator[str]:
        """Have it running as `template-manager run` resumes it; yields its network."""
        running = self.vm(vm.scope, VmPurpose.VERIFY)
        await run(self.networks.set_up_network, running)
        process = self.process(running)
        process.make()
        launch = launch_of(self.settings, require_host(self.settings, self.shape), self.shape)
        files = self.bench.store.path(snapshot.step, snapshot.fingerprint)
        seconds = self.settings.resume_seconds
        await asyncio.to_thread(resume, process, files, launch, lambda: None, seconds=seconds)
        yield running.name
        await run(self.vms.kill_vm, running)

    def said(self, vm: VmRef) -> str:
        """Return what the start command has said on the console, whose long lines come in parts."""
        lines = self.process(vm).console.read_text(errors="replace").splitlines()
        return "".join(
            line.removeprefix(OUT).removeprefix("-part")[1:] for line in lines if OUT in line
        )

    def report(self, vm: VmRef) -> dict[str, Any]:
        """Return what a program in a guest has said as JSON behind `REPORT `."""
        said = self.said(vm)
        assert "REPORT {" in said, said
        found, _ = json.JSONDecoder().raw_decode(said.partition("REPORT ")[2])
        return dict(found)

    async def remove_all(self) -> None:
        for vm in self._made:
            await run(self.vms.kill_vm, vm)
            await run(self.networks.tear_down_network, vm)


async def until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def run(activity: Any, *arguments: Any) -> Any:
    return await ActivityEnvironment().run(activity, *arguments)


@asynccontextmanager
async def vm_host(
    data_dir: Path,
    kernels_dir: Path | None = None,
    firecracker_dir: Path | None = None,
    **settings: Any,
) -> AsyncIterator[VmHost]:
    """Have such a host for a block; nothing of it is left at the end.

    By default it has the dev stack's kernel and stand-in.
    """
    stack = environment()
    bench = workbench(
        data_dir,
        kernels_dir=kernels_dir or stack.kernels,
        firecracker_dir=firecracker_dir or stack.firecracker.parent.parent,
        **settings,
    )
    before = HostResources.count(bench.settings.data_dir)
    made = VmHost(bench)
    try:
        yield made
    finally:  # else the VM of a test that fails takes CPU from all that follow
        await made.remove_all()
    bench.remove_images()
    for lease in (bench.settings.data_dir / "leases").glob("*"):
        lease.unlink()
    before.assert_unchanged(bench.settings.data_dir)
