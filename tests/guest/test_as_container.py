"""A guest is what a container of its image is: the same probes in both, compared raw.

The reference is `docker run` of the same image on the same machine. What may differ stands in the
table of docs/guest.md, a row a probe, with its reason; anything else fails.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet
from devstack.registry import Registry, running_registry

from tests.support.as_container import in_container, in_guest, require_the_same
from tests.support.probed_images import ProbedImage, probed_images
from tests.support.vm_host import VmHost, vm_host

pytestmark = pytest.mark.counts_host


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
        expected = in_container(client, image_id, by_entrypoint=image.by_entrypoint)
        found = await in_guest(
            host, f"{repository}:latest", tmp_path / "out", by_entrypoint=image.by_entrypoint
        )
    finally:
        client.images.remove(image_id, force=True)
    require_the_same(found, expected)
