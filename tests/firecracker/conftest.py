"""Real Firecracker, or a loud skip: see `tests/support/real_firecracker.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry, running_registry

from activities.contract.results import PulledImage
from tests.support.real_firecracker import IMAGE_CONFIG, TEST_SECONDS, RealFirecracker
from tests.support.vm_host import VmHost

HERE = Path(__file__).parent
SHORT = "test_build.py"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real_firecracker)
            item.add_marker(pytest.mark.counts_host)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
            if item.path.name != SHORT:
                item.add_marker(pytest.mark.whole)


@pytest.fixture(scope="session")
def firecracker() -> RealFirecracker:
    return RealFirecracker.given()


@pytest.fixture(scope="session")
def registry(
    firecracker: RealFirecracker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """An empty registry that wants no login."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest_asyncio.fixture
async def host(firecracker: RealFirecracker, tmp_path: Path) -> AsyncIterator[VmHost]:
    async with firecracker.host(tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def image(host: VmHost, registry: Registry) -> PulledImage:
    layer = Layer().directory("bin").busybox().directory("srv").add("srv/index.html", b"hello\n")
    registry.push("real-busybox", [layer.tar()], config=IMAGE_CONFIG)
    return await host.bench.pull(f"{registry.address}/real-busybox")
