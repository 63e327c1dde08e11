"""One host's activities, for tests and the bench of single rooms."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from activities.contract.inputs import BuildRootfsInput, PullImageInput
from activities.contract.names import ArtifactName
from activities.contract.registry_logins import RegistryLogin
from activities.contract.results import PulledImage
from activities.contract.scope import BuildScope, HostLease
from activities.disk.data_dir import DataDir
from activities.image.docker_daemon import make_docker_client
from activities.image.pull import DockerImageActivities
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.rootfs.rootfs import HostRootfsActivities
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger

HOST = "test-host"


@dataclass
class Workbench:
    """One host's activities on a data directory of the test, with a lease for each build."""

    settings: Settings
    secret_keys: Sealer
    client: docker.APIClient = field(default_factory=make_docker_client)
    pulled: list[PulledImage] = field(default_factory=list)

    def __post_init__(self) -> None:
        data_dir = DataDir(self.settings.data_dir)
        self.ledger = LeaseLedger(data_dir)
        self.store = CheckpointStore(data_dir, self.settings.host)
        self.images = DockerImageActivities(
            self.settings, self.ledger, self.secret_keys, make_docker_client
        )
        self.rootfs = HostRootfsActivities(self.settings, self.ledger, self.store, self.client)

    def scope(self, build_id: str | None = None, number: int = 1) -> BuildScope:
        """Take a lease for a build, a new one unless it is named."""
        build_id = build_id or str(uuid.uuid4())
        self.ledger.put(
            build_id=build_id,
            template_id="test",
            workflow_id=f"template-build-{build_id}",
            number=number,
            lifetime_seconds=7200,
        )
        lease = HostLease(host=self.settings.host, number=number)
        return BuildScope(build_id=build_id, template_id="test", lease=lease)

    async def pull(
        self,
        image: str,
        auth: RegistryLogin | None = None,
        scope: BuildScope | None = None,
        timeout_seconds: float = 60,
        **more: Any,
    ) -> PulledImage:
        """Run `pull_image`."""
        asked = PullImageInput(
            scope=scope or self.scope(),
            image=image,
            auth=auth,
            timeout_seconds=timeout_seconds,
            **more,
        )
        pulled: PulledImage = await _environment().run(self.images.pull_image, asked)
        self.pulled.append(pulled)
        return pulled

    def rootfs_input(
        self, image: PulledImage, scope: BuildScope | None = None, **more: Any
    ) -> BuildRootfsInput:
        """Make the input of `build_rootfs`, with small defaults."""
        defaults: dict[str, Any] = {
            "scope": scope or self.scope(),
            "image": image,
            "disk_size_mb": 16,
            "memory_mb": 128,
            "start_command": "",
            "ready_command": "",
            "env": {},
            "ready_timeout_seconds": 30,
            "provision_timeout_seconds": 120,
        }
        return BuildRootfsInput(**(defaults | more))

    async def build_rootfs(
        self, image: PulledImage, scope: BuildScope | None = None, **more: Any
    ) -> Path:
        """Run `build_rootfs`; return where `rootfs.ext4` is."""
        asked = self.rootfs_input(image, scope, **more)
        checkpoint = await _environment().run(self.rootfs.build_rootfs, asked)
        return self.store.file(checkpoint, ArtifactName.ROOTFS)

    def log_of(self, scope: BuildScope) -> str:
        """Return the build's log file."""
        return DataDir(self.settings.data_dir).log(scope.build_id).read_text()

    def remove_images(self) -> None:
        """Remove the images that this workbench has pulled."""
        for image in self.pulled:
            with contextlib.suppress(docker.errors.APIError):
                self.client.remove_image(image.image_id, force=True)


def workbench(directory: Path, **settings: Any) -> Workbench:
    """Make a workbench on a new data directory."""
    key = "test:" + "A" * 43 + "="
    values: dict[str, Any] = {
        "data_dir": directory,
        "host": HOST,
        "secret_keys": key,
        "internal_registries": ("127.0.0.0/8",),
        **settings,
    }
    made = Settings(**values)
    return Workbench(made, Sealer(made.secret_keys))


def _environment() -> Any:
    from temporalio.testing import ActivityEnvironment

    return ActivityEnvironment()
