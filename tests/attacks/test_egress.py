"""A guest that may use the internet reaches nothing else, whatever its root does.

The host worker, and with it what leads the guest out, works in a network namespace whose one wire
ends in the test's own (`devstack.inner_internet`): no rule that fails lets a packet out of
this machine, and what got as far as the wire is seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import pytest_asyncio
from devstack.inner_internet import (
    DENIED,
    DOCKER_BRIDGE,
    HOST_ADDRESS,
    METADATA,
    NAME,
    OTHER_PUBLIC,
    PRIVATE,
    PUBLIC,
    RESOLVER,
    InnerInternet,
    inner_internet,
)
from devstack.registry import Layer, Registry
from devstack.stack import Stack

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import ImageStepError, NetworkNameError
from activities.contract.image_steps import Run
from activities.contract.network_policy import (
    INTERNET,
    NO_NETWORK,
    NetworkAccess,
    NetworkPolicy,
)
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.microvm.network import in_network
from activities.microvm.vm_supervisor import EGRESS_ENDED, EGRESS_TABLE, NOT_DENIED
from activities.store.bucket import Bucket
from tests.support.guest_python import COMMAND, add_python
from tests.support.host_resources import HostResources
from tests.support.step_host import StepHost
from tests.support.vm_host import VmHost, until, vm_host

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

T = TypeVar("T")

INSIDE = (*PRIVATE, HOST_ADDRESS, DOCKER_BRIDGE, DENIED)
# slirp4netns' own, and the guest's gateway.
OF_THE_WAY = ("10.0.2.2", "10.0.2.3", "10.0.2.100", "169.254.0.22", "127.0.0.2", "0.0.0.0")
TARGETS = {
    "tcp": [PUBLIC, METADATA, *INSIDE, *OF_THE_WAY],
    "udp": [*INSIDE, *OF_THE_WAY],
    # The resolver is that of the host, which has other ports, too.
    "ports": ["10.0.2.3:22", "10.0.2.3:80", "169.254.0.22:53"],
    "dns": ["8.8.8.8", METADATA, PRIVATE[0]],
    "six": ["fd00::2", "::ffff:10.9.8.7", "2001:db8::1"],
    "forged": ["10.9.9.9", PUBLIC, HOST_ADDRESS, "169.254.0.22", "127.0.0.1", "10.0.2.100"],
    "raw": [OTHER_PUBLIC, *INSIDE, METADATA, "10.0.2.2", "127.0.0.1"],
}
PROGRAMS = Path(__file__).with_name("egress_guest")
MODULES = (
    "collections.abc",
    "hashlib",
    "contextlib",
    "fcntl",
    "json",
    "os",
    "socket",
    "struct",
    "threading",
    "time",
)
# Its seccomp filter, and the one capability that is left to it.
ALL_GIVEN_UP = {"CapPrm": 1 << 10, "CapEff": 1 << 10, "CapBnd": 1 << 10, "CapAmb": 0}
WHEEL = bytes(range(256)) * 400
FETCH = f"{COMMAND} /fetch.py"


@pytest.fixture
def internet(tmp_path: Path) -> Iterator[InnerInternet]:
    place = tmp_path / "internet"
    place.mkdir()
    with inner_internet(place) as made:
        yield made


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with vm_host(tmp_path / "data", denied_networks=[f"{DENIED}/32"]) as made:
        made.ready_seconds = 300
        yield made


@pytest_asyncio.fixture
async def image(host: VmHost, registry: Registry) -> PulledImage:
    layer = add_python(Layer().directory("bin").busybox(), MODULES)
    for name in ("attacks.py", "fetch.py"):
        layer.add(name, PROGRAMS.joinpath(name).read_bytes())
    layer.add("targets.json", json.dumps(TARGETS).encode())
    registry.push("egress", [layer.symlink("bin/sh", "busybox").tar()])
    return await host.bench.pull(f"{registry.address}/egress")


async def test_the_internet_and_nothing_else(
    host: VmHost, image: PulledImage, internet: InnerInternet
) -> None:
    vm = host.vm()
    attack = f"{COMMAND} /attacks.py /targets.json; >/done; /bin/busybox sleep 1000"
    rootfs = await host.rootfs(image, vm, start_command=attack, ready_command="[ -e /done ]")

    async def work() -> None:
        await host.start(vm, rootfs, network=INTERNET)
        (carrier,) = carriers()
        await host.wait(vm)
        assert_nothing_but_the_internet(host.report(vm), internet)
        assert_confined(carrier)
        carrier.kill()
        assert ended(host, vm) == EGRESS_ENDED  # and the build tries again

    await on_host(internet, host, work)


@pytest.mark.whole
async def test_what_is_named_and_nothing_else(
    host: VmHost, image: PulledImage, internet: InnerInternet
) -> None:
    """A name is resolved by the host, when the VM starts."""
    vm = host.vm()
    ask = f"{FETCH} {NAME} {OTHER_PUBLIC} {DENIED}; >/done"
    rootfs = await host.rootfs(image, vm, start_command=ask, ready_command="[ -e /done ]")
    unknown = NetworkPolicy(access=NetworkAccess.ALLOW, allowed=("nowhere.example.com",))
    named = NetworkPolicy(access=NetworkAccess.ALLOW, allowed=(NAME, f"{DENIED}/32"))

    async def work() -> None:
        with pytest.raises(NetworkNameError, match=r"nowhere\.example\.com"):
            await host.start(vm, rootfs, network=unknown)
        await host.start(vm, rootfs, network=named)
        await host.wait(vm)

    await on_host(internet, host, work)
    assert internet.reached == [PUBLIC]
    assert internet.seen == {PUBLIC, RESOLVER}


@pytest.mark.whole
async def test_what_becomes_the_hosts_own_later_is_not_reached(
    host: VmHost, image: PulledImage, internet: InnerInternet
) -> None:
    """An address, and a network that is routed to it. A guest that cannot be kept off ends."""
    vm, both = host.vm(), (PUBLIC, OTHER_PUBLIC)
    ask = f"while :; do {FETCH} {' '.join(both)}; >/done; done"
    rootfs = await host.rootfs(image, vm, start_command=ask, ready_command="[ -e /done ]")

    def refused(times: int) -> bool:
        said = host.process(vm).console.read_text(errors="replace")
        return all(said.count(f"{one} ! ") >= times for one in both)

    async def work() -> None:
        await host.start(vm, rootfs, network=INTERNET)
        await host.wait(vm)
        assert set(internet.reached) == set(both)
        internet.give_host(address=PUBLIC, network=f"{OTHER_PUBLIC}/32")
        await until(lambda: refused(2), 200)
        reached = [*internet.reached]
        await until(lambda: refused(5), 200)
        assert internet.reached == reached
        in_network(vm.name, remove_table)
        internet.give_host(address="198.51.100.20", network="198.51.100.30/31")
        assert NOT_DENIED in ended(host, vm)

    await on_host(internet, host, work)


def remove_table() -> None:
    command = ["nft", "delete", "table", *EGRESS_TABLE.split()]
    subprocess.run(command, check=True)


@pytest.mark.whole
async def test_a_snapshot_has_no_network_of_ours(
    host: VmHost, image: PulledImage, internet: InnerInternet
) -> None:
    """It is resumed without one, as `run` and `verify` do; its resolver is any."""
    vm = host.vm()
    ask = f"/bin/busybox cat /etc/resolv.conf; {FETCH} {NAME}; >/done; /bin/busybox sleep 1000"
    rootfs = await host.rootfs(image, vm, start_command=ask, ready_command="[ -e /done ]")
    shape = host.shape
    host.shape = shape.model_copy(update={"network": INTERNET})

    async def work() -> None:
        await host.start(vm, rootfs)
        await host.start(vm, rootfs)  # a worker that was restarted takes it up
        assert len(carriers()) == 1
        await host.wait(vm)
        snapshot = await host.snapshot(vm, rootfs)
        assert carriers() == []
        await host.verify(vm, snapshot)
        assert carriers() == []
        async with host.resumed(vm, snapshot):
            assert carriers() == []

    await on_host(internet, host, work)
    assert "nameserver 8.8.8.8" in host.bench.log_of(vm.scope)
    assert internet.reached == [PUBLIC]


@pytest.mark.whole
async def test_a_step_fetches_what_an_index_has(
    host: VmHost,
    image: PulledImage,
    internet: InnerInternet,
    tmp_path: Path,
    storage: Stack,
    empty_bucket: Bucket,
) -> None:
    """As pip does: a page of links, then a file by its hash. Without network it is another step."""
    steps = StepHost(host, empty_bucket, tmp_path)
    sha256 = hashlib.sha256(WHEEL).hexdigest()
    internet.pages["/simple/"] = f"/files/one.whl#sha256={sha256}\n".encode()
    internet.pages["/files/one.whl"] = WHEEL
    fetch = f"{FETCH} {NAME}/simple/ /one.whl"
    vm = host.vm()
    bare = await steps.bare(image, vm)

    async def build(network: NetworkPolicy) -> RootfsCheckpoint:
        shape = host.shape.model_copy(update={"network": network})
        return await steps.build(image, Run(command=fetch), vm=vm, disk=bare, shape=shape)

    async def work() -> None:
        made = await build(INTERNET)
        assert steps.tree(made)["/one.whl"].size == len(WHEEL)
        assert (await build(INTERNET)).reused
        with pytest.raises(ImageStepError):
            await build(NO_NETWORK)

    with internet.lending(storage.environment.ports.gcs):  # is asked for layers
        await on_host(internet, host, work)
    assert internet.reached == [PUBLIC, PUBLIC]


def assert_nothing_but_the_internet(report: dict[str, str], internet: InnerInternet) -> None:
    resolved = bytes(map(int, PUBLIC.split("."))).hex()
    assert report.pop(f"tcp {PUBLIC}").endswith("public\n")
    assert "Firecracker" in report.pop(f"tcp {METADATA}")  # the VMM's own, not the host's
    assert report.pop("resolve") == PUBLIC
    for address in TARGETS["dns"]:
        assert report.pop(f"dns {address}").endswith(resolved)
    assert report.pop("raw").endswith(" frames")
    refused = {f"{kind} {each}" for kind in ("tcp", "udp", "six") for each in TARGETS[kind]}
    refused |= {f"port {each}" for each in TARGETS["ports"]} | {"forged"}
    assert set(report) == refused - {f"tcp {PUBLIC}", f"tcp {METADATA}"}
    assert {name: told for name, told in report.items() if not told.startswith("! ")} == {}
    assert internet.reached == [PUBLIC]
    assert internet.seen == {PUBLIC, RESOLVER}


def assert_confined(carrier: psutil.Process) -> None:
    lines = Path(f"/proc/{carrier.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {name: int(status[name], 16) for name in ALL_GIVEN_UP} == ALL_GIVEN_UP
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert carrier.environ() == {}
    root = Path(f"/proc/{carrier.pid}/root")
    assert sorted(path.name for path in root.iterdir()) == ["etc", "run"]
    assert [path.name for path in (root / "etc").iterdir()] == ["resolv.conf"]
    assert [path.name for path in (root / "run").iterdir()] in ([], ["mount"])
    assert "-boot.egress\n" in Path(f"/proc/{carrier.pid}/cgroup").read_text()


def carriers() -> list[psutil.Process]:
    found = psutil.process_iter(["name"])
    return [process for process in found if process.info["name"] == "slirp4netns"]


def ended(host: VmHost, vm: VmRef) -> str:
    deadline = time.monotonic() + 30
    while host.process(vm).is_running():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while not (host.process(vm).directory / "exit.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return host.process(vm).exit_reason()


async def on_host(
    internet: InnerInternet, host: VmHost, work: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Work on the host within its netns; of its VMs nothing is left there."""
    before = HostResources.count(host.settings.data_dir)

    async def all_of_it() -> T:
        try:
            return await work()
        finally:
            await host.remove_all()
            before.assert_unchanged(host.settings.data_dir)

    return await asyncio.to_thread(internet.from_host, lambda: asyncio.run(all_of_it()))
