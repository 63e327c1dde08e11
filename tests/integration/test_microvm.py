"""Booting, watching, snapshotting and resuming real guests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry
from devstack.small_agent import ANSWER, VERSION, init_agent, write_agent
from pyroute2 import netns
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import (
    CheckpointLostError,
    FirecrackerMissingError,
    GuestDiedError,
    HostDiskFullError,
    KernelMissingError,
    LeaseLostError,
    ReadyTimeoutError,
    SnapshotNotResumableError,
    StartCommandError,
    TemplateManagerError,
    TemplateNotFoundError,
    VmmEndedError,
)
from activities.contract.inputs import (
    FindSnapshotInput,
    StartVmInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.names import ArtifactName, Step, VmPurpose
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.disk.ext4 import check_filesystem
from activities.disk.sparse_files import dig_holes
from activities.host.local_run import local_template
from activities.microvm import microvm
from activities.microvm.clock import read_clock
from activities.microvm.microvm import HostMicrovmActivities
from activities.microvm.network import in_network
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings
from tests.support.local_http import HTTPD, HTTPD_ANSWERS, HTTPD_LISTENS, get_page
from tests.support.real_firecracker import JAILED, STAND_IN, config_for, host_of, on_both
from tests.support.small_disk import filled, small_disk
from tests.support.vm_host import VmHost, run, until, vm_host

pytestmark = pytest.mark.counts_host


# Where Firecracker runs in its jailer; without, it runs in tests/firecracker.
ON_BOTH = pytest.mark.parametrize("host", on_both(JAILED), indirect=True)


@pytest_asyncio.fixture
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VmHost]:
    async with host_of(getattr(request, "param", STAND_IN), tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def image(host: VmHost, registry: Registry) -> PulledImage:
    return await busybox(host, registry)


async def busybox(host: VmHost, registry: Registry) -> PulledImage:
    layer = Layer().directory("bin").busybox().directory("srv").add("srv/index.html", b"hello\n")
    registry.push("vm-busybox", [layer.tar()], config=config_for(host))
    return await host.bench.pull(f"{registry.address}/vm-busybox")


@ON_BOTH
async def test_from_boot_to_a_verified_snapshot(host: VmHost, image: PulledImage) -> None:
    vm, rootfs = await host.boot(image, start_command=HTTPD, ready_command=HTTPD_LISTENS)
    assert host.process(vm).is_running()
    snapshot = await host.snapshot(vm, rootfs)
    assert not host.process(vm).is_running()  # killed and waited for
    assert set(snapshot.files) == {"rootfs.ext4", "memfile", "snapfile"}
    assert snapshot.files["memfile"].size_bytes == host.shape.memory_mb << 20
    assert snapshot.facts.fsck_clean
    verified = await host.verify(vm, snapshot)
    assert 0 < verified.load_ms <= verified.resume_ms < 30_000
    is_stand_in = "qemu" in snapshot.facts.vmm_version
    assert (verified.prefetch == ()) == is_stand_in  # which does not tell
    log = host.bench.log_of(vm.scope)
    assert "guest is ready" in log
    assert "the snapshot resumes" in log


async def test_whole_steps_bring_their_networks_and_leave_nothing(
    host: VmHost, image: PulledImage
) -> None:
    boot = host.whole(host.vm())
    verify = host.whole(host.vm(boot.scope, VmPurpose.VERIFY))
    rootfs = await host.rootfs(image, boot)
    asked = StartVmInput(vm=boot, rootfs=rootfs, shape=host.shape)
    for _ in range(2):  # the first attempt was not heard of
        await run(host.vms.start_vm, asked)
    await host.wait(boot)
    assert boot.name in netns.listnetns()
    snapshot = await host.snapshot(boot, rootfs)
    assert boot.name not in netns.listnetns()
    assert not host.process(boot).directory.exists()
    assert await host.snapshot(boot, rootfs) == snapshot
    for _ in range(2):
        resumed = VerifySnapshotInput(vm=verify, snapshot=snapshot, shape=host.shape)
        await run(host.vms.verify_snapshot, resumed)
        assert verify.name not in netns.listnetns()
        assert not host.process(verify).directory.exists()


async def test_a_whole_step_that_fails_leaves_its_vm_to_the_undos(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.whole(host.vm())
    rootfs = await host.rootfs(image, vm)
    await run(host.vms.start_vm, StartVmInput(vm=vm, rootfs=rootfs, shape=host.shape))
    await asyncio.to_thread(host.process(vm).kill)
    with pytest.raises(CheckpointLostError):
        await host.snapshot(vm, rootfs)
    assert vm.name in netns.listnetns()
    await run(host.vms.kill_vm, vm)
    await run(host.networks.tear_down_network, vm)
    assert vm.name not in netns.listnetns()


async def test_the_measured_clock_is_the_guests(host: VmHost, image: PulledImage) -> None:
    """What it was off before the snapshot it is after the resume: the time between was added."""
    vm, rootfs = await host.boot(image)
    # Its clock chip tells whole seconds, which the kernel's driver takes for the middle of one; and
    # QEMU's begins one when QEMU starts, so up to a second late: from 1.5 s behind to half a second
    # ahead. 100 ms more for what it counts wrong.
    read = await asyncio.to_thread(read_clock, vm.name, lambda: None)
    assert read is not None
    assert -1600 - read.error_ms < read.skew_ms < 600 + read.error_ms
    snapshot = await host.snapshot(vm, rootfs)
    before = snapshot.facts.clock_skew_ms
    assert before is not None
    assert abs(before - read.skew_ms) < 250
    await asyncio.sleep(3)
    verified = await host.verify(vm, snapshot)
    assert verified.seconds_since_snapshot > 3
    assert abs(before - verified.clock_skew_ms) < 500
    assert "set it after a resume" not in host.bench.log_of(vm.scope)
    ahead = snapshot.facts.model_copy(update={"clock_skew_ms": before + 100_000})
    with pytest.raises(SnapshotNotResumableError, match=r"clock is -\d+\.\d s off although"):
        await host.verify(vm, snapshot.model_copy(update={"facts": ahead}))


async def test_the_server_answers_after_a_resume(host: VmHost, image: PulledImage) -> None:
    """As `template-manager run` resumes it, on a copy of the disk, as often as one likes."""
    vm, rootfs = await host.boot(image, start_command=HTTPD, ready_command=HTTPD_ANSWERS)
    snapshot = await host.snapshot(vm, rootfs)
    directory = host.bench.store.path(snapshot.step, snapshot.fingerprint)
    before = (directory / "rootfs.ext4").read_bytes()
    for _ in range(2):
        async with host.resumed(vm, snapshot) as name:
            answer = await asyncio.to_thread(in_network, name, lambda: get_page(20))
            assert b"200 OK" in answer
            assert answer.endswith(b"hello\n")
    assert (directory / "rootfs.ext4").read_bytes() == before
    check_filesystem(directory / "rootfs.ext4", lambda: None)


ASKER = """\
#!/bin/busybox sh
# What it waits for at the snapshot never comes.
ask() {
  printf '%s HTTP/1.1\\r\\n%s\\r\\n\\r\\n' "$@" | timeout 15 nc 169.254.169.254 80 | tail -n 1
}
while :; do
  token=$(ask 'PUT /latest/api/token' X-metadata-token-ttl-seconds:900)
  ask 'GET /who' "X-metadata-token:$token" > /srv/new
  mv /srv/new /srv/index.html
  sleep 1
done &
exec httpd -f -p 8080 -h /srv
"""


@ON_BOTH
async def test_a_resumed_guest_reads_the_metadata_that_it_is_given(
    host: VmHost, registry: Registry
) -> None:
    """Each VM that is resumed from one snapshot its own, at the paths that consumers know."""
    layer = Layer().directory("bin").busybox().directory("srv")
    layer = layer.add("asker", ASKER.encode(), mode=0o755)
    registry.push("asker", [layer.tar()], config=config_for(host))
    image = await host.bench.pull(f"{registry.address}/asker")
    vm, rootfs = await host.boot(image, start_command="/asker", ready_command=HTTPD_LISTENS)
    snapshot = await host.snapshot(vm, rootfs)
    for who in ("first", "second"):
        async with host.resumed(vm, snapshot) as name:
            with VmProcess(DataDir(host.settings.data_dir).vm(name)).client() as client:
                config: Any = client._call("GET", "/vm/config")
                assert config["mmds-config"]["version"] == "V2"
                assert config["drives"][0]["path_on_host"] == "/fc-vm/rootfs.ext4"
                client._call("PUT", "/mmds", {"who": who})
            await until_page(name, who)


async def test_the_snapshot_waits_for_the_agent_which_answers_at_once_after_a_resume(
    tmp_path: Path, registry: Registry
) -> None:
    agent = write_agent(tmp_path / "agent")
    layer = Layer().directory("bin").busybox().symlink("bin/sh", "busybox")
    registry.push("with-agent", [layer.tar()])
    async with vm_host(tmp_path / "data", guest_agent_path=agent) as host:
        image = await host.bench.pull(f"{registry.address}/with-agent")
        vm, rootfs = await host.boot(image)
        assert rootfs.facts.agent_version == VERSION
        snapshot = await host.snapshot(vm, rootfs)
        async with host.resumed(vm, snapshot) as name:
            answer = await asyncio.to_thread(in_network, name, init_agent)
        assert answer == ANSWER
        # One that ends is told, and not what else may be wrong.
        agent.write_text('#!/bin/sh\n[ -z "${1-}" ] || echo 0.2.5\n')
        with pytest.raises(StartCommandError, match="the guest agent has ended"):
            await host.boot(image)


async def until_page(network: str, told: str) -> None:
    deadline = time.monotonic() + 300
    while not (page := await page_of(network)).endswith(told):
        assert time.monotonic() < deadline, page
        await asyncio.sleep(0.5)


async def page_of(network: str) -> str:
    return (await asyncio.to_thread(in_network, network, lambda: get_page(60))).decode()


async def test_a_command_that_does_not_exist_fails_at_once(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, start_command="/no/such/server --port 1")
    await host.start(vm, rootfs)
    began = time.monotonic()
    with pytest.raises(StartCommandError, match="exit code 127") as error:
        await host.wait(vm, 120)
    assert time.monotonic() - began < 60
    assert any("/no/such/server" in line for line in error.value.log_tail)
    assert error.value.hint


async def test_a_command_that_dies_later_is_told_with_its_output(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    command = "echo listening; echo 'bad config' >&2; sleep 1; exit 3"
    rootfs = await host.rootfs(image, vm, start_command=command, ready_command="false")
    await host.start(vm, rootfs)
    with pytest.raises(StartCommandError, match="exit code 3") as error:
        await host.wait(vm)
    assert {"listening", "bad config"} <= set(error.value.log_tail)


async def test_a_ready_command_that_never_succeeds_is_bounded(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(
        image, vm, start_command="sleep 1000", ready_command="echo still waiting; exit 7"
    )
    await host.start(vm, rootfs)
    began = time.monotonic()
    with pytest.raises(
        ReadyTimeoutError, match=r"within 12 s.*tried \d+ times.*exit code 7"
    ) as error:
        await host.wait(vm, 12)
    assert time.monotonic() - began < 20
    assert any("still waiting" in line for line in error.value.log_tail)


async def test_a_ready_command_that_hangs_is_bounded_too(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, ready_command="sleep 100000")
    await host.start(vm, rootfs)
    with pytest.raises(ReadyTimeoutError):
        await host.wait(vm, 10)


@ON_BOTH
async def test_a_guest_that_powers_off_is_told(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(
        image, vm, start_command="/bin/busybox reboot -f", ready_command="false"
    )
    await host.start(vm, rootfs)
    with pytest.raises(GuestDiedError, match="reboot: Restarting system"):
        await host.wait(vm)


async def test_a_kernel_panic_is_told(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(
        image, vm, start_command="echo c > /proc/sysrq-trigger", ready_command="false"
    )
    await host.start(vm, rootfs)
    with pytest.raises(GuestDiedError, match="Kernel panic"):
        await host.wait(vm)


async def test_values_arrive_exactly_as_they_are(host: VmHost, image: PulledImage) -> None:
    odd = "a 'b' \"c\" $HOME `id` \\ * ; & | é\n-----BEGIN KEY-----\nline=2\n"
    command = (
        """printf '%s' "$ODD" > /srv/odd; """
        """printf '%s' 'single "double" $(no) `no` \\n' > /srv/text"""
    )
    vm, rootfs = await host.boot(
        image,
        start_command=command,
        ready_command="[ -e /srv/text ]",
        env={"ODD": odd, "EMPTY": ""},
    )
    snapshot = await host.snapshot(vm, rootfs)
    disk = host.bench.store.path(snapshot.step, snapshot.fingerprint) / "rootfs.ext4"
    assert _debugfs_cat(disk, "/srv/odd") == odd.encode()
    assert _debugfs_cat(disk, "/srv/text") == b'single "double" $(no) `no` \\n'


def _debugfs_cat(disk: Path, path: str) -> bytes:
    done = subprocess.run(["debugfs", "-R", f"cat {path}", disk], capture_output=True, check=True)
    return done.stdout


async def test_commands_run_as_the_image_says(host: VmHost, registry: Registry) -> None:
    layer = Layer().directory("bin").busybox().directory("etc").directory("home")
    layer.add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nweb:x:1234:1235::/home/web:/bin/sh\n")
    layer.add("etc/group", b"root:x:0:\nweb:x:1235:\nextra:x:4321:web\n")
    layer.directory("home/web", uid=1234, gid=1235)
    config = {"User": "web", "WorkingDir": "/home/web", "Env": ["COLOR=blue", "PATH=/bin"]}
    registry.push("vm-user", [layer.tar()], config=config)
    image = await host.bench.pull(f"{registry.address}/vm-user")
    told = "/bin/busybox id > id; /bin/busybox pwd > pwd; echo $COLOR:$PATH:$HOME:$SHAPE > env"
    vm, rootfs = await host.boot(
        image, start_command=told, ready_command="[ -e env ]", env={"SHAPE": "round"}
    )
    snapshot = await host.snapshot(vm, rootfs)
    disk = host.bench.store.path(snapshot.step, snapshot.fingerprint) / "rootfs.ext4"
    identity = _debugfs_cat(disk, "/home/web/id").decode()
    assert identity.startswith("uid=1234")
    assert "gid=1235" in identity
    assert "4321" in identity
    assert _debugfs_cat(disk, "/home/web/pwd") == b"/home/web\n"
    environment = _debugfs_cat(disk, "/home/web/env").decode().strip()
    assert environment.startswith("blue:/bin")
    assert environment.endswith(":/home/web:round")


async def test_the_guest_has_the_free_space_and_the_network_it_should(
    host: VmHost, image: PulledImage
) -> None:
    told = (
        "/bin/busybox df -m / | /bin/busybox tail -n 1; /bin/busybox nslookup -type=a localhost;"
        " /bin/busybox ip addr show eth0; /bin/busybox cat /etc/resolv.conf; /bin/busybox hostname"
    )
    told += "; echo > /srv/told"
    vm, _ = await host.boot(
        image, start_command=told, ready_command="[ -e /srv/told ] && sleep 1", disk_size_mb=200
    )
    log = [json.loads(line)["message"] for line in host.bench.log_of(vm.scope).splitlines()]
    disk = next(line for line in log if line.rstrip().endswith(" /")).split()
    assert 196 <= int(disk[-3]) <= 204
    assert any("169.254.0.21/30" in line for line in log)
    assert "nameserver 8.8.8.8" in log
    assert "instance" in log


@ON_BOTH
async def test_a_killed_vmm_is_told_and_another_attempt_boots(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, start_command="sleep 1000", ready_command="false")
    await host.start(vm, rootfs)
    pids = json.loads((host.process(vm).directory / "vmm.json").read_text())
    os.kill(pids["vmm"][0], signal.SIGKILL)
    with pytest.raises(VmmEndedError, match="signal 9"):
        await host.wait(vm)
    await host.start(vm, rootfs)
    assert host.process(vm).is_running()


async def test_a_killed_supervisor_takes_its_vmm_along(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, start_command="sleep 1000", ready_command="false")
    await host.start(vm, rootfs)
    pids = json.loads((host.process(vm).directory / "vmm.json").read_text())
    os.kill(pids["supervisor"][0], signal.SIGKILL)
    with pytest.raises(VmmEndedError):
        await host.wait(vm)


async def test_a_restarted_worker_takes_up_the_vm(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(
        image, vm, start_command="echo said once; sleep 1000", ready_command="sleep 4"
    )
    await host.start(vm, rootfs)
    before = (host.process(vm).directory / "vmm.json").read_text()
    environment = ActivityEnvironment()
    asked = WaitUntilReadyInput(vm=vm, timeout_seconds=60)
    waiting = asyncio.ensure_future(environment.run(host.vms.wait_until_ready, asked))
    await until(lambda: "said once" in host.bench.log_of(vm.scope))
    environment.cancel()  # the worker is stopped, the VM is not
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert time.monotonic() - began < 5
    again = HostMicrovmActivities(host.settings, host.bench.ledger, host.bench.store)
    await run(again.start_vm, StartVmInput(vm=vm, rootfs=rootfs, shape=host.shape))
    await run(again.wait_until_ready, asked)
    assert (host.process(vm).directory / "vmm.json").read_text() == before
    log = [json.loads(line)["message"] for line in host.bench.log_of(vm.scope).splitlines()]
    assert log.count("said once") == 1
    assert log.count("guest is ready") == 1


async def test_a_vm_that_was_paused_for_a_snapshot_is_booted_anew(
    host: VmHost, image: PulledImage
) -> None:
    """The host was given up in the middle of a snapshot, and has got the build back."""
    vm, rootfs = await host.boot(image)
    with host.process(vm).client() as client:
        client.pause()
    await host.start(vm, rootfs)
    await run(host.vms.wait_until_ready, WaitUntilReadyInput(vm=vm, timeout_seconds=60))
    await host.snapshot(vm, rootfs)
    assert host.bench.log_of(vm.scope).count("VM started") == 2


async def test_a_snapshot_that_was_not_heard_of_is_found(host: VmHost, image: PulledImage) -> None:
    vm, rootfs = await host.boot(image)
    first = await host.snapshot(vm, rootfs)
    again = await host.snapshot(vm, rootfs)  # the worker died before its answer arrived
    assert again == first


async def test_two_tenants_do_not_share_a_memory(host: VmHost, image: PulledImage) -> None:
    made = []
    for tenant in ("acme", "beta"):
        scope = host.bench.scope().model_copy(update={"tenant": tenant})
        vm = host.vm(scope)
        rootfs = await host.rootfs(image, vm)
        find = FindSnapshotInput(scope=scope, rootfs=rootfs, shape=host.shape)
        assert await run(host.vms.find_snapshot, find) is None
        await host.start(vm, rootfs)
        await host.wait(vm)
        made.append((rootfs.fingerprint, await host.snapshot(vm, rootfs)))
        found = await run(host.vms.find_snapshot, find)
        assert found.fingerprint == made[-1][1].fingerprint
    (rootfs_of_one, one), (rootfs_of_other, other) = made
    assert rootfs_of_one != rootfs_of_other  # only what is bare of a public image is everybody's
    assert one.fingerprint != other.fingerprint
    assert one.files["memfile"].sha256 != other.files["memfile"].sha256


async def test_a_lost_vm_goes_back_to_the_boot(host: VmHost, image: PulledImage) -> None:
    vm, rootfs = await host.boot(image)
    await run(host.vms.kill_vm, vm)
    with pytest.raises(CheckpointLostError) as error:
        await host.snapshot(vm, rootfs)
    assert error.value.step is Step.BOOT


async def test_a_damaged_snapshot_is_not_resumable_and_not_used_again(
    host: VmHost, image: PulledImage
) -> None:
    vm, rootfs = await host.boot(image)
    snapshot = await host.snapshot(vm, rootfs)
    directory = host.bench.store.path(snapshot.step, snapshot.fingerprint)
    snapfile = directory / "snapfile"
    before = snapfile.stat()
    snapfile.write_bytes(b"\xff" * before.st_size)
    os.utime(snapfile, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SnapshotNotResumableError, match="does not load"):
        await host.verify(vm, snapshot)
    with pytest.raises(CheckpointLostError, match="of no use") as error:
        await host.verify(vm, snapshot)  # a build that goes on from what it had
    assert error.value.step is Step.BOOT
    find = FindSnapshotInput(scope=vm.scope, rootfs=rootfs, shape=host.shape)
    assert await run(host.vms.find_snapshot, find) is None


async def test_what_the_host_lacks_is_named_before_any_work(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm)
    cases: list[tuple[dict[str, Any], type[TemplateManagerError], str]] = [
        ({"kernel_version": "vmlinux-0.1"}, KernelMissingError, "vmlinux-0.1/vmlinux.bin"),
        ({"firecracker_version": "v0.0.1"}, FirecrackerMissingError, "v0.0.1/firecracker"),
    ]
    for change, kind, text in cases:
        with pytest.raises(kind, match=text):
            await host.start(vm, rootfs, **change)
        assert not host.process(vm).directory.exists()


async def test_a_host_without_the_lease_starts_no_vm(host: VmHost, image: PulledImage) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(image, vm)
    host.bench.scope(vm.scope.build_id, number=2)
    with pytest.raises(LeaseLostError):
        await run(host.vms.start_vm, StartVmInput(vm=vm, rootfs=rootfs, shape=host.shape))
    assert not host.process(vm).directory.exists()


async def test_a_later_lease_kills_the_vm_of_an_earlier_one(
    host: VmHost, image: PulledImage
) -> None:
    old, _ = await host.boot(image, start_command=HTTPD)
    new = host.vm(host.bench.scope(old.scope.build_id, number=2))
    await run(host.vms.kill_vm, new)
    assert not host.process(old).directory.exists()
    await run(host.vms.kill_vm, new)


async def test_much_output_neither_blocks_nor_fills_anything(
    host: VmHost, image: PulledImage
) -> None:
    command = "yes 0123456789abcdef0123456789abcdef | head -n 600; echo last line; echo > /done"
    vm, _ = await host.boot(image, start_command=command, ready_command="[ -e /done ] && sleep 3")
    log = host.bench.log_of(vm.scope)
    assert "last line" in log
    assert log.count("0123456789abcdef0123456789abcdef") == 600


@pytest.mark.parametrize("kind", on_both(JAILED))
async def test_a_disk_that_fills_at_any_step_of_a_snapshot_is_told_and_nothing_stays(
    tmp_path: Path, registry: Registry, kind: str
) -> None:
    """When there is room again the same step goes on, as long as there is a VM to go on with."""
    with small_disk(tmp_path, 700) as disk:
        async with host_of(kind, disk) as host:
            image = await busybox(host, registry)
            vm = host.vm()
            rootfs = await host.rootfs(image, vm)
            await require_full(host, host.start(vm, rootfs), disk, "cannot copy rootfs.ext4", MIB)
            if kind == JAILED:  # the jailer copies Firecracker
                left_bytes = rootfs.files[ArtifactName.ROOTFS].allocated_bytes + 2 * MIB
                told = "the VMM ended at once: .*No space left on device"
                await require_full(host, host.start(vm, rootfs), disk, told, left_bytes)
            await host.start(vm, rootfs)
            await host.wait(vm)
            told = "no room for the snapshot"
            for left_bytes in (0, MIB, 50 * MIB):  # nothing can be written; the state; some memory
                await require_full(host, host.snapshot(vm, rootfs), disk, told, left_bytes)
                assert not any(path.stat().st_size for path in written_by_vmm(host, vm))
            snapshot = await host.snapshot(vm, rootfs)
            verify = host.verify(vm, snapshot)
            await require_full(host, verify, disk, "cannot copy rootfs.ext4", MIB)
            await host.verify(vm, snapshot)


@pytest.mark.parametrize("kind", on_both(JAILED))
async def test_a_disk_that_fills_once_the_vm_has_ended_leaves_nothing_either(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The snapshot is taken and not kept: the build boots again."""
    with small_disk(tmp_path, 700) as disk, ExitStack() as filling:
        async with host_of(kind, disk) as host:
            vm, rootfs = await host.boot(await busybox(host, registry))

            def dig_and_fill(path: Path, check: Callable[[], None]) -> int:
                dug = dig_holes(path, check)
                filling.enter_context(filled(disk))
                return dug

            monkeypatch.setattr(microvm, "dig_holes", dig_and_fill)
            before = in_steps(host)
            with pytest.raises(HostDiskFullError, match="the host's disk is full"):
                await host.snapshot(vm, rootfs)
            assert in_steps(host) == before
            filling.close()
            with pytest.raises(CheckpointLostError):
                await host.snapshot(vm, rootfs)


def in_steps(host: VmHost) -> set[Path]:
    """Return checkpoints, and what is to become some."""
    return set(DataDir(host.settings.data_dir).steps.glob("*/*"))


async def require_full(
    host: VmHost, step: Awaitable[object], disk: Path, told: str, left_bytes: int
) -> None:
    """Require that a step says so, with what to do, and leaves nothing unfinished."""
    before = in_steps(host)
    with filled(disk, left_bytes), pytest.raises(HostDiskFullError, match=told) as error:
        await step
    assert error.value.hint
    assert in_steps(host) == before


def written_by_vmm(host: VmHost, vm: VmRef) -> list[Path]:
    return [host.process(vm).files / name for name in ("memfile", "snapfile")]


async def test_memory_that_is_zero_takes_no_disk(host: VmHost, image: PulledImage) -> None:
    """The VMM writes every page; what is kept, hashed and counted is what the guest has used."""
    vm, rootfs = await host.boot(image)
    snapshot = await host.snapshot(vm, rootfs)
    memory = snapshot.files["memfile"]
    assert memory.size_bytes == 256 << 20
    assert 0 < memory.allocated_bytes < 200 << 20
    kept = host.bench.store.path(snapshot.step, snapshot.fingerprint) / "memfile"
    assert kept.stat().st_blocks * 512 == memory.allocated_bytes
    [checkpoint] = [each for each in host.bench.store.all() if each.path == kept.parent]
    assert checkpoint.bytes < 256 << 20
    await host.verify(vm, snapshot)


FILE_LINE = b"read by the start command, written to memory and removed again\n"
# A program that takes 80 % of what memory the guest has, and writes to all of it.
TAKE_PAGE = """\
#!/bin/busybox sh
printf '\n'
kib=$(/bin/busybox sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
exec /bin/busybox dd if=/dev/zero of=/dev/null bs=$((kib / 10 * 8))k count=1 iflag=fullblock 2>&1
"""


async def test_a_snapshot_keeps_what_the_commands_have_read_and_not_what_they_have_freed(
    host: VmHost, registry: Registry
) -> None:
    """And the resumed guest can use all of its memory."""
    layer = Layer().directory("bin").busybox().directory("srv").directory("srv/cgi-bin")
    layer.add("srv/file", FILE_LINE * (MIB // len(FILE_LINE)))
    layer.add("srv/cgi-bin/take", TAKE_PAGE.encode(), mode=0o755)
    registry.push("vm-freed", [layer.tar()])
    image = await host.bench.pull(f"{registry.address}/vm-freed")
    write = "for _ in $(seq 16); do cat /srv/file >> /dev/shm/freed; done; rm /dev/shm/freed"
    vm, rootfs = await host.boot(
        image, start_command=f"{write}; {HTTPD}", ready_command=HTTPD_LISTENS
    )
    snapshot = await host.snapshot(vm, rootfs)
    memory = host.bench.store.path(snapshot.step, snapshot.fingerprint) / ArtifactName.MEMFILE
    kept = memory.read_bytes().count(FILE_LINE) * len(FILE_LINE) / MIB
    assert 0.9 < kept < 8, f"{kept:.1f} of 17 MiB"
    async with host.resumed(vm, snapshot) as name:
        assert b"1+0 records in" in await _page(name, "/cgi-bin/take")
        assert b"1+0 records in" in await _page(name, "/cgi-bin/take")  # it has it back


async def test_all_vcpus_go_on_after_a_resume(host: VmHost, image: PulledImage) -> None:
    """Each of them counts by itself, and is bound to one vCPU."""
    host.shape = host.shape.model_copy(update={"vcpu_count": 4})
    count = "n=0; while :; do n=$((n + 1)); echo $n > /srv/$cpu; /bin/busybox usleep 20000; done"
    each = f"(export cpu=$cpu; /bin/busybox taskset -c $cpu /bin/busybox sh -c '{count}') &"
    start = f"for cpu in 0 1 2 3; do {each} done; {HTTPD}"
    ready = f"[ $(/bin/busybox nproc) = 4 ] && [ -s /srv/3 ] && {HTTPD_ANSWERS}"
    vm, rootfs = await host.boot(image, start_command=start, ready_command=ready)
    snapshot = await host.snapshot(vm, rootfs)
    await host.verify(vm, snapshot)
    async with host.resumed(vm, snapshot) as name:
        for cpu in range(4):
            first = await _page(name, f"/{cpu}")
            assert b"200 OK" in first
            deadline = time.monotonic() + 60
            while await _page(name, f"/{cpu}") == first:
                assert time.monotonic() < deadline, f"vCPU {cpu} stands still"


async def _page(network: str, path: str) -> bytes:
    return await asyncio.to_thread(in_network, network, lambda: get_page(20, path))


async def test_a_busy_disk_survives_the_snapshot(host: VmHost, image: PulledImage) -> None:
    """Writes are under way when the VM is paused; the resumed guest goes on writing."""
    command = (
        "while :; do /bin/busybox dd if=/dev/zero of=/srv/busy bs=64k count=32 2>/dev/null;"
        " /bin/busybox sync; /bin/busybox date > /srv/index.html; done & " + HTTPD
    )
    vm, rootfs = await host.boot(
        image, start_command=command, ready_command=HTTPD_ANSWERS, disk_size_mb=64
    )
    snapshot = await host.snapshot(vm, rootfs)
    await host.verify(vm, snapshot)


def test_running_a_template_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(TemplateNotFoundError, match=r"metadata\.json"):
        local_template(tmp_path, Settings())


async def test_the_images_own_command(host: VmHost, registry: Registry) -> None:
    layer = Layer().directory("bin").busybox().directory("srv").add("srv/index.html", b"hello\n")
    config = {
        "Entrypoint": ["/bin/busybox", "sh", "-c", 'printf "%s|" "$@" > /srv/said', "name"],
        "Cmd": ["it's", "$HOME", 'a "b"'],
    }
    registry.push("vm-command", [layer.tar()], config=config)
    image = await host.bench.pull(f"{registry.address}/vm-command")
    vm, rootfs = await host.boot(image, start_command="image", ready_command="[ -s /srv/said ]")
    snapshot = await host.snapshot(vm, rootfs)
    disk = host.bench.store.path(snapshot.step, snapshot.fingerprint) / "rootfs.ext4"
    assert _debugfs_cat(disk, "/srv/said") == b'it\'s|$HOME|a "b"|'


async def test_an_image_without_a_command_has_none_to_run(host: VmHost, image: PulledImage) -> None:
    with pytest.raises(StartCommandError, match="neither ENTRYPOINT nor CMD"):
        await host.rootfs(image, host.vm(), start_command="image")
