"""Root file systems of real images as layers: made by one host, taken by others."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from devstack.registry import Layer, Registry
from devstack.stack import Stack
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import TemplateManagerError
from activities.contract.image_steps import Run
from activities.contract.inputs import RunStepsInput, SendLayersInput
from activities.contract.names import ArtifactName, VmPurpose
from activities.contract.results import ImageConfig, PulledImage
from activities.contract.scope import BuildScope, VmRef, VmShape
from activities.disk.ext4 import check_filesystem
from activities.disk.sparse_files import sha256_of
from activities.instructions.disk_steps import VmDiskStepActivities
from activities.instructions.plan import chain_of, plan
from activities.rootfs.rootfs import HostRootfsActivities
from activities.step.layer_disks import LayerDisks, layer_of
from activities.store.bucket import Bucket
from activities.store.download import pull_template
from activities.store.layers import LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.metadata import read_metadata
from activities.template.ahead import BucketLayerActivities
from activities.template.layering import LayerMaker
from activities.template.sending import FileSender
from tests.support.example_template import pulled_image
from tests.support.held_build import HeldBuild
from tests.support.layered_builds import LayeredBuild, changed
from tests.support.step_checks import go_on
from tests.support.step_host import read

pytestmark = pytest.mark.counts_host


class Host:
    """A host with a data directory of its own, and the one dockerd."""

    def __init__(self, bench: Workbench, bucket: Bucket) -> None:
        self.bench = bench
        self.bucket = bucket
        layers = LayerDisks(bench.settings, bucket, bench.store)
        self.rootfs = HostRootfsActivities(
            bench.settings, bench.ledger, bench.store, bench.client, layers
        )

    def steps(self) -> VmDiskStepActivities:
        bench = self.bench
        return VmDiskStepActivities(
            bench.settings, bench.ledger, bench.store, self.bucket, bench.secret_keys
        )

    def layers(self) -> BucketLayerActivities:
        bench, leases = self.bench, LeaseObjects(self.bucket)
        sender = FileSender(bench.settings, self.bucket)
        maker = LayerMaker(bench.settings, self.bucket, bench.store, sender)
        return BucketLayerActivities(bench.settings, bench.ledger, bench.store, leases, maker)

    def scope(self) -> BuildScope:
        build_id, host = str(uuid.uuid4()), self.bench.settings.host
        return self.bench.scope(
            build_id, LeaseObjects(self.bucket).take(build_id, host, "workflow", None)
        )

    async def make(
        self, image: PulledImage, scope: BuildScope, command: str
    ) -> tuple[LayeredBuild, RootfsCheckpoint]:
        asked = self.bench.rootfs_input(image, scope, start_command=command)
        made = await ActivityEnvironment().run(self.rootfs.build_rootfs, asked)
        held = HeldBuild(self.bench.settings, self.bench.ledger, self.bench.store, scope)
        disk = self.bench.store.file(made, ArtifactName.ROOTFS).read_bytes()
        return LayeredBuild(held, self.bucket, made.chain, disk), made


@asynccontextmanager
async def hosts(place: Path, bucket: Bucket, count: int) -> AsyncIterator[list[Host]]:
    benches = [workbench(place / f"host-{number}") for number in range(count)]
    yield [Host(bench, bucket) for bench in benches]
    for bench in benches:
        bench.remove_images()


def sha256(disk: bytes) -> str:
    return hashlib.sha256(disk).hexdigest()


def push(registry: Registry) -> str:
    layer = Layer().directory("bin").busybox().symlink("bin/sh", "busybox").directory("etc")
    layer.add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:7:7::/srv:/bin/sh\n")
    for number in range(60):
        layer.add(f"etc/file-{number}", f"{number}".encode() * 20_000)
    registry.push("layered", [layer.tar()], config={"User": "web", "WorkingDir": "/srv/web"})
    return f"{registry.address}/layered"


async def test_a_host_takes_the_disk_of_an_image_out_of_the_bucket(
    tmp_path: Path, empty_bucket: Bucket, registry: Registry
) -> None:
    """What another host has made is not made again; another command adds a few blocks."""
    name = push(registry)
    async with hosts(tmp_path, empty_bucket, 2) as (one, two):
        first, made = await one.make(await one.bench.pull(name), scope := one.scope(), "serve")
        assert "copying" in one.bench.log_of(scope)
        assert [key.owner for key in made.chain] == ["", "default"]
        flattened = sha256(first.disk)
        await first.publish(first.boots("first"))
        image = await two.bench.pull(name)
        same, found = await two.make(image, scope := two.scope(), "serve")
        assert found.reused and found.facts == made.facts and sha256(same.disk) == flattened
        assert "is taken from the bucket" in two.bench.log_of(scope)
        assert "copying" not in two.bench.log_of(scope)
        second, other = await two.make(image, scope := two.scope(), "other")
        assert "copying" not in two.bench.log_of(scope)
        assert other.chain[0] == made.chain[0] and other.chain[1] != made.chain[1]
        path = two.bench.store.file(other, ArtifactName.ROOTFS)
        check_filesystem(path, go_on)
        assert read(path, "/.template/start.command") == "other"
        assert read(path, "/.template/user").split()[0] == "7"
        assert read(path, "/.template/workdir") == "/srv/web"
        await second.publish(second.boots("second"))
        layers = [read_metadata(empty_bucket, b.held.scope.build_id) for b in (first, second)]
        sizes = [
            [layer.objects["data"].size_bytes for layer in each.layers] if each else []
            for each in layers
        ]
        assert sizes[0][0] == sizes[1][0] > 10 * sizes[1][1]


@pytest.mark.whole
async def test_two_hosts_flatten_one_image_at_once(
    tmp_path: Path, empty_bucket: Bucket, registry: Registry
) -> None:
    name = push(registry)
    async with hosts(tmp_path, empty_bucket, 2) as both:
        images = [await host.bench.pull(name) for host in both]
        made = await asyncio.gather(
            *(
                host.make(image, host.scope(), "serve")
                for host, image in zip(both, images, strict=True)
            )
        )
        builds = [build for build, _ in made]
        snapshots = [build.boots(number) for number, build in enumerate(builds)]
        ready = zip(builds, snapshots, strict=True)
        await asyncio.gather(*(build.publish(snapshot) for build, snapshot in ready))
        for build in builds:
            target = tmp_path / "out" / build.held.scope.build_id
            pull_template(empty_bucket, build.held.scope.build_id, target, lambda *_: None)
            assert sha256_of(target / ArtifactName.ROOTFS, go_on) == sha256(build.disk)


def asked(scope: BuildScope, disk: RootfsCheckpoint, count: int = 2) -> RunStepsInput:
    """Ask for so many steps. The shape that is asked for is none of this host's: no VM runs."""
    return RunStepsInput(
        vm=VmRef(scope=scope, purpose=VmPurpose.BOOT),
        disk=disk,
        image=pulled_image().model_copy(update={"config": ImageConfig()}),
        steps=tuple(Run(command=f"make {number}") for number in range(count)),
        shape=VmShape(
            memory_mb=64, vcpu_count=1, kernel_version="none", firecracker_version="none"
        ),
        disk_size_mb=1,
        timeout_seconds=1,
        start_command="",
        ready_command="",
        env={},
    )


def with_base(
    host: Host, scope: BuildScope, seed: str = "base"
) -> tuple[LayeredBuild, RootfsCheckpoint]:
    """Have a host make the disk that steps begin with, of 1.2 MiB that come of `seed`."""
    bench = host.bench
    held = HeldBuild(bench.settings, bench.ledger, bench.store, scope)
    build = LayeredBuild(held, host.bucket).makes("base", seed, 300)
    [key] = build.chain
    return build, RootfsCheckpoint(
        fingerprint=key.fingerprint, host=bench.settings.host, chain=build.chain
    )


@pytest.mark.parametrize(
    ("base_here", "most_mib"), [(None, 2), ("base", 1), ("other bytes of it", 2)]
)
async def test_a_host_takes_the_disk_of_a_step_out_of_the_bucket(
    tmp_path: Path,
    empty_bucket: Bucket,
    storage: Stack,
    base_here: str | None,
    most_mib: int,
) -> None:
    """Of what it has already, which must be the very bytes, it fetches only the difference."""
    async with hosts(tmp_path, empty_bucket, 2) as (one, two):
        build, base = with_base(one, one.scope())
        wanted = asked(build.held.scope, base)
        todo = plan(one.bench.settings, wanted)
        for number, work in enumerate(todo):
            build.disk = changed(build.disk, number, 7)
            build.keeps(work.key)
        build.chain = chain_of(wanted, todo)
        await build.publish(build.boots())

        scope = two.scope()
        if base_here:
            with_base(two, scope, base_here)
        storage.traffic(clear=True)
        made = await ActivityEnvironment().run(two.steps().run_steps, asked(scope, base))
        assert made.reused and made.chain == build.chain
        fetched = storage.traffic()["operations"]["download"]["bytes_out"]
        assert (most_mib - 1) << 20 < fetched < most_mib << 20
        assert "is taken from the bucket" in two.bench.log_of(scope)
        both = (host.bench.store.file(made, ArtifactName.ROOTFS) for host in (one, two))
        assert len({sha256_of(path, go_on) for path in both}) == 1


@pytest.mark.whole
async def test_of_a_lost_host_another_takes_what_was_sent_before(
    tmp_path: Path, empty_bucket: Bucket
) -> None:
    """It is lost in step 5 of 5: the other one begins after step 3 at the latest."""
    async with hosts(tmp_path, empty_bucket, 2) as (one, two):
        build, base = with_base(one, lost := one.scope())
        wanted, environment = asked(lost, base, 5), ActivityEnvironment()
        todo = plan(one.bench.settings, wanted)
        sending = asyncio.create_task(
            environment.run(one.layers().send_layers, SendLayersInput(scope=lost, steps=wanted))
        )
        chain, layers = chain_of(wanted, todo), LayerObjects(empty_bucket)
        for number in range(4):
            async with asyncio.timeout(60):  # the disk below goes up while the next one is made
                while layers.read(layer_of(chain[number])) is None:
                    await asyncio.sleep(0.1)
            build.disk = changed(build.disk, number, 7)
            build.keeps(todo[number].key)
        environment.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        number = LeaseObjects(empty_bucket).take(lost.build_id, "two", "workflow", None)
        scope = two.bench.scope(lost.build_id, number)
        with pytest.raises(TemplateManagerError) as stopped:  # no VM of this shape runs here
            await ActivityEnvironment().run(two.steps().run_steps, asked(scope, base, 5))
        assert stopped.value.step_number in (4, 5)
        log = two.bench.log_of(scope)
        assert f"{todo[2].name}: an earlier build's is used again" in log
        assert "is taken from the bucket: nothing is made here" in log
