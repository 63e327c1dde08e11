"""A host that runs steps in real VMs, and what is asked of the disks that they leave."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path
from typing import Any

from devstack.registry import Layer, Registry

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.image_steps import ImageStep
from activities.contract.inputs import ImportTemplateInput, RunStepsInput
from activities.contract.names import ArtifactName, VmPurpose
from activities.contract.registry_logins import Sealed
from activities.contract.results import ImageConfig, PulledImage
from activities.contract.scope import VmRef
from activities.disk.data_dir import DataDir
from activities.instructions.disk_steps import VmDiskStepActivities
from activities.process.sealing import SealedFor
from activities.store.bucket import Bucket
from activities.template.base import BucketBaseActivities
from tests.support.copied_files import uploaded_files
from tests.support.file_trees import Entry, tree_of_ext4
from tests.support.vm_host import VmHost, run


class StepHost:
    """A host that runs steps, with a bucket for the files of COPY."""

    def __init__(self, host: VmHost, bucket: Bucket, place: Path) -> None:
        settings = host.settings.model_copy(update={"image_step_memory_mb": 256})
        self.host = host
        self.bucket = bucket
        self.place = place
        self.activities = VmDiskStepActivities(
            settings, host.bench.ledger, host.bench.store, bucket, host.bench.secret_keys
        )

    async def bare(self, image: PulledImage, vm: VmRef, **more: Any) -> RootfsCheckpoint:
        plain = image.model_copy(update={"config": ImageConfig()})
        return await self.host.rootfs(plain, vm, bare=True, **more)

    async def build(
        self, image: PulledImage, *steps: ImageStep, vm: VmRef | None = None, **more: Any
    ) -> RootfsCheckpoint:
        vm = vm or self.host.vm(purpose=VmPurpose.BOOT)
        disk = image.base.disk if image.base else await self.bare(image, vm)
        await run(self.host.networks.set_up_network, vm)
        asked: dict[str, Any] = {
            "vm": vm,
            "disk": disk,
            "image": image,
            "steps": steps,
            "shape": self.host.shape,
            "disk_size_mb": 16,
            "timeout_seconds": 60,
            "start_command": "",
            "ready_command": "",
            "env": {},
        }
        made: RootfsCheckpoint = await run(self.activities.run_steps, RunStepsInput(**asked | more))
        return made

    async def take(self, build_id: str, *, tenant: str = "", **settings: Any) -> PulledImage:
        """Bring the disk of a published template to this host."""
        bench = self.host.bench
        activities = BucketBaseActivities(
            bench.settings.model_copy(update=settings), bench.ledger, bench.store, self.bucket
        )
        scope = bench.scope()
        if tenant:
            scope = scope.model_copy(update={"tenant": tenant})
        asked = ImportTemplateInput(scope=scope, build_id=build_id, shape=self.host.shape)
        taken: PulledImage = await run(activities.import_template, asked)
        return taken

    def sealed(self, vm: VmRef, **secrets: str) -> dict[str, Sealed]:
        """Seal secret variables as the API does for a build."""
        build_id, seal = vm.scope.build_id, self.host.bench.secret_keys.seal
        return {
            name: seal(value, SealedFor(build_id, "", variable=name))
            for name, value in secrets.items()
        }

    def log(self, vm: VmRef) -> str:
        path = DataDir(self.host.settings.data_dir).log(vm.scope.build_id)
        return path.read_text() if path.exists() else ""

    def disk(self, made: RootfsCheckpoint) -> Path:
        return self.host.bench.store.file(made, ArtifactName.ROOTFS)

    def tree(self, made: RootfsCheckpoint) -> dict[str, Entry]:
        return tree_of_ext4(self.disk(made), self.place / uuid.uuid4().hex)

    def files(self, **contents: str) -> str:
        """Upload files of these names (`__` is a slash) and contents; returns their tar's name."""
        return uploaded_files(self.bucket, self.place, contents)


async def base_of(host: StepHost, registry: Registry, **config: Any) -> PulledImage:
    layer = Layer().directory("bin").busybox().symlink("bin/sh", "busybox").directory("etc")
    layer.add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:1234:1235::/home:/bin/sh\n")
    layer.add("etc/group", b"root:x:0:\nstaff:x:50:\n").directory("run").directory("var")
    layer.symlink("var/run", "/run").directory("tmp", mode=0o1777)
    registry.push("steps-base", [layer.tar()], config=config)
    return await host.host.bench.pull(f"{registry.address}/steps-base")


def read(disk: Path, path: str) -> str:
    """Return a file of an ext4 that is not mounted."""
    command = ["debugfs", "-R", f'cat "{path}"', str(disk)]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()
