"""The VMM's metadata service, attacked from inside: a guest gets its own data, and stops nobody."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry

from activities.contract.errors import VmmError
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from tests.support.guest_python import COMMAND, add_python
from tests.support.vm_host import VmHost, vm_host

# Guests with Python take long.
pytestmark = [
    pytest.mark.counts_host,
    pytest.mark.whole,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("undisturbed"),
]

PROGRAM = Path(__file__).with_name("egress_guest") / "metadata.py"
MODULES = ("json", "socket", "threading", "time")
ATTACK = f"{COMMAND} /metadata.py"
REFUSED = (400, 404, 405)


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with vm_host(tmp_path / "data") as made:
        made.ready_seconds = 300
        yield made


@pytest_asyncio.fixture
async def image(host: VmHost, registry: Registry) -> PulledImage:
    layer = add_python(Layer().directory("bin").busybox(), MODULES)
    layer.add("metadata.py", PROGRAM.read_bytes())
    registry.push("metadata", [layer.symlink("bin/sh", "busybox").tar()])
    return await host.bench.pull(f"{registry.address}/metadata")


async def started(host: VmHost, image: PulledImage, how: str) -> VmRef:
    """Have a guest that does this, and is ready when it has."""
    vm = host.vm()
    command = f"{ATTACK} {how}; >/done; /bin/busybox sleep 1000"
    rootfs = await host.rootfs(image, vm, start_command=command, ready_command="[ -e /done ]")
    await host.start(vm, rootfs)
    return vm


def give(host: VmHost, vm: VmRef, **data: str) -> None:
    """Give a VM data, as an orchestrator does."""
    with host.process(vm).client() as client:
        client._call("PUT", "/mmds", data)


async def test_a_guest_gets_its_own_data_by_its_own_token(host: VmHost, image: PulledImage) -> None:
    other = await started(host, image, "tell")
    give(host, other, who="another", secret="of another")
    await host.wait(other)
    vm = await started(host, image, "attack")
    give(host, vm, who="me", foreign=host.report(other)["token"])
    await host.wait(vm)
    told: dict[str, Any] = host.report(vm)
    assert told.pop("who") == told.pop("afterwards") == [200, "me"]
    assert told.pop("all") == [200, "foreign\nwho"]
    assert all(status in REFUSED for status in told.pop("not ours"))
    assert all(status in REFUSED for status in told.pop("written"))
    assert set(told.pop("lifetimes")) <= {0, 400}
    assert told.pop("forwarded") == 400
    assert told.pop("a token that is long") in (0, 400, 401)
    assert set(told.values()) == {401}
    with host.process(other).client() as client:
        assert client._call("GET", "/mmds") == {"who": "another", "secret": "of another"}


async def test_a_guest_that_floods_its_service_holds_up_nobody(
    host: VmHost, image: PulledImage
) -> None:
    """Its VMM has what its cgroup lets it have: it answers us or not, soon, and can be ended."""
    vm = await started(host, image, "nonsense")
    give(host, vm, who="me", foreign="none")
    deadline = time.monotonic() + 300
    while "REPORT " not in host.said(vm) and not has_ended(host, vm):
        began = time.monotonic()
        with host.process(vm).client() as client, suppress(VmmError):
            assert client.state() == "Running"
        assert time.monotonic() - began < 30
        assert time.monotonic() < deadline
    began = time.monotonic()
    host.process(vm).kill()
    assert time.monotonic() - began < 30


def has_ended(host: VmHost, vm: VmRef) -> bool:
    return (host.process(vm).directory / "exit.json").exists()
