"""Which checkpoints tenants share: the bare disks of public images, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.inputs import BuildRootfsInput
from activities.contract.names import DEFAULT_TENANT
from activities.contract.scope import BuildScope, HostLease, VmShape
from activities.microvm.microvm import snapshot_fingerprint
from activities.process.settings import Settings
from activities.rootfs.rootfs import rootfs_fingerprint
from tests.support.example_template import BUILD, pulled_image

TENANTS = (DEFAULT_TENANT, "acme", "beta")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(kernels_dir=tmp_path / "kernels", firecracker_dir=tmp_path / "firecracker")
    for path in (made.kernel_path("6.1"), made.firecracker_path("v1")):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    return made


def scope_of(tenant: str) -> BuildScope:
    lease = HostLease(host="h1", number=1)
    return BuildScope(build_id=BUILD, template_id="web", lease=lease, tenant=tenant)


def rootfs_key(settings: Settings, tenant: str, image_of: str = "", *, bare: bool = False) -> str:
    build = BuildRootfsInput(
        scope=scope_of(tenant),
        image=pulled_image().model_copy(update={"tenant": image_of}),
        disk_size_mb=64,
        memory_mb=512,
        start_command="serve",
        ready_command="check",
        env={},
        ready_timeout_seconds=1,
        provision_timeout_seconds=1,
    )
    return rootfs_fingerprint(settings, build.as_bare() if bare else build)


def test_two_tenants_never_have_the_same_memory_snapshot(settings: Settings) -> None:
    rootfs = RootfsCheckpoint(fingerprint="f" * 64, host="h1")
    shape = VmShape(memory_mb=512, vcpu_count=1, kernel_version="6.1", firecracker_version="v1")
    keys = [snapshot_fingerprint(settings, rootfs, shape, tenant) for tenant in TENANTS]
    assert len(set(keys)) == 3
    assert keys[1] == snapshot_fingerprint(settings, rootfs, shape, "acme")


def test_the_bare_disk_of_a_public_image_is_everybodys(settings: Settings) -> None:
    assert len({rootfs_key(settings, tenant, bare=True) for tenant in TENANTS}) == 1
    private = {rootfs_key(settings, tenant, image_of=tenant, bare=True) for tenant in TENANTS}
    assert len(private | {rootfs_key(settings, DEFAULT_TENANT, bare=True)}) == 4


def test_any_other_root_file_system_is_its_tenant_s(settings: Settings) -> None:
    """Their layers are: so a host would take away the one's bytes for the other's each time."""
    public = {rootfs_key(settings, tenant) for tenant in TENANTS}
    assert len(public) == 3
    private = {rootfs_key(settings, tenant, image_of=tenant) for tenant in TENANTS}
    assert len(private) == 3
    assert rootfs_key(settings, DEFAULT_TENANT) not in private
