"""A guest is what a container of its image is: the same probes in both, compared raw.

The reference is `docker run` of the same image on the same machine. What may differ stands in the
table of docs/guest.md, a row a probe, with its reason; anything else fails.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet
from devstack.registry import Registry, running_registry

from activities.contract.requests import IMAGE_COMMAND
from tests.support.probed_images import ARGUMENTS, PROBE, ProbedImage, probed_images
from tests.support.vm_host import VmHost, vm_host

pytestmark = pytest.mark.counts_host

TABLE = Path(__file__).parents[2] / "docs" / "guest.md"
HOST_NAME = "instance"
DNS_SERVER = "8.8.8.8"
READY = "/probe/busybox test -e /probe/out/done"
DISK_MB = 32

# The same, as a start command's text.
COMMAND = f"exec {shlex.join((*PROBE, *ARGUMENTS))}"

Answers = dict[str, bytes]


def allowed_differences() -> set[str]:
    """Return the probes that the docs let differ."""
    return set(re.findall(r"^\| `([a-z-]+)` \|", TABLE.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    with closing(docker.from_env(timeout=600)) as connected:
        yield connected


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with vm_host(tmp_path / "data") as made:
        yield made


def in_container(client: docker.DockerClient, image_id: str, image: ProbedImage) -> Answers:
    """Return what the probes say in a container."""
    container = client.containers.create(
        image_id,
        hostname=HOST_NAME,
        dns=[DNS_SERVER],
        entrypoint=["/bin/sh", "-c"] if image.by_entrypoint else None,
        command=[COMMAND] if image.by_entrypoint else None,
    )
    try:
        container.start()
        assert container.wait(timeout=120)["StatusCode"] == 0, container.logs()
        content, _ = container.get_archive("/probe/out")
        with tarfile.open(fileobj=io.BytesIO(b"".join(content))) as archive:
            members = [member for member in archive if member.isfile()]
            return {
                Path(member.name).name: (archive.extractfile(member) or io.BytesIO()).read()
                for member in members
            }
    finally:
        container.remove(force=True)


async def in_guest(host: VmHost, reference: str, image: ProbedImage, place: Path) -> Answers:
    """Return what they say in a guest, read from its disk when it is dead."""
    pulled = await host.bench.pull(reference)
    command = IMAGE_COMMAND
    if image.by_entrypoint:
        command = COMMAND
    vm = host.vm()
    rootfs = await host.rootfs(
        pulled, vm, start_command=command, ready_command=READY, disk_size_mb=DISK_MB
    )
    await host.start(vm, rootfs)
    await host.wait(vm, 180)
    process = host.process(vm)
    process.kill()
    return files_of(process.directory / "rootfs.ext4", "/probe/out", place)


def files_of(disk: Path, directory: str, place: Path) -> Answers:
    """Return the files of a directory on an ext4 whose guest has just died."""
    subprocess.run(["e2fsck", "-fy", disk], capture_output=True, check=False)
    place.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump {directory} {place}", disk], capture_output=True, check=True
    )
    return {path.name: path.read_bytes() for path in (place / Path(directory).name).iterdir()}


def every_image() -> list[ParameterSet]:
    """Return the images; those that are not in the short form are marked."""
    short = ("Debian with systemd", "an /init of its own", "a USER that is only a number")
    return [
        pytest.param(image, id=image.name, marks=() if image.name in short else pytest.mark.whole)
        for image in probed_images()
    ]


@pytest.mark.parametrize("image", every_image())
async def test_a_guest_answers_as_a_container_of_its_image(
    image: ProbedImage,
    host: VmHost,
    registry: Registry,
    client: docker.DockerClient,
    tmp_path: Path,
) -> None:
    image_id = image.make(client)
    repository = f"{registry.address}/probed-{uuid.uuid4().hex[:8]}"
    try:
        client.images.get(image_id).tag(repository, "latest")
        client.images.push(repository, "latest")
        expected = in_container(client, image_id, image)
        found = await in_guest(host, f"{repository}:latest", image, tmp_path / "out")
    finally:
        client.images.remove(image_id, force=True)
    assert found.keys() == expected.keys()
    differing = {name for name in expected if expected[name] != found[name]}
    told = {name: (expected[name], found[name]) for name in differing - allowed_differences()}
    assert not told, "\n".join(
        f"{name}: container {ours!r}, guest {theirs!r}" for name, (ours, theirs) in told.items()
    )
