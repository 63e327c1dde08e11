"""VMMs that their guests have taken over: what they write is bounded, and they end when told to.

Each is a program of the test's, started as every VMM is.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from activities.contract.units import MIB
from activities.disk.cgroups import Limits
from activities.disk.data_dir import DataDir
from activities.microvm.launching import CONSOLE_BYTES_EVER, Launch
from activities.microvm.network import create_network, remove_network
from activities.microvm.vm_process import VmProcess
from activities.microvm.vm_supervisor import LINE_BYTES, LOG_BYTES
from tests.support import standin_vmm, writing_vmm
from tests.support.host_resources import HostResources
from tests.support.step_checks import go_on

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

DISK_BYTES = 1024 * MIB
LIMITS = Limits(memory_mb=512, processes=32, cpus=1)


@contextmanager
def taken_over(place: Path, disk: bytes) -> Iterator[VmProcess]:
    """Have a VM whose guest has just done that; nothing of it is left at the end."""
    program = place / "program" / "firecracker"
    module = program.with_name("tests") / "support" / Path(standin_vmm.__file__).name
    module.parent.mkdir(parents=True)
    shutil.copy(standin_vmm.__file__, module)
    shutil.copy(writing_vmm.__file__, program)
    program.chmod(0o755)
    data_dir = DataDir(place / "data")
    before = HostResources.count(place / "data")
    vm = VmProcess(data_dir.vm(f"tm-{uuid.uuid4()}-1-boot"))
    vm.make()
    with (vm.files / "rootfs.ext4").open("wb") as file:
        file.write(disk)
        file.truncate(DISK_BYTES)
    create_network(vm.name)
    try:
        launch = Launch(
            program,
            LIMITS,
            users=range(30_000, 31_000),
            console_bytes=MIB,
            hidden=(place / "data",),
            own=("rootfs.ext4",),
        )
        vm.start(launch, go_on)
        with vm.client() as client:
            client.start()
        yield vm
    finally:
        print("\n".join(vm.log_tail()))  # of a test that fails
        vm.remove()
        remove_network(vm.name)
    before.assert_unchanged(place / "data")


def test_a_vmm_writes_to_its_own_disk_alone_and_not_beyond_its_end(tmp_path: Path) -> None:
    """Before: as many files as it liked in its socket's directory, and in /tmp of the host."""
    with taken_over(tmp_path, b"") as vm, vm.client() as client:
        told: Any = client._call("GET", "/report")
        assert client.version() == "1.13.1"  # its socket is still there
    assert told.pop("ipc") != str(Path("/proc/self/ns/ipc").readlink())
    assert told == {
        "made": [],
        "files": ["/fc-vm/rootfs.ext4"],
        "largest": DISK_BYTES + CONSOLE_BYTES_EVER,
        "grown": "EFBIG",
        "written far": "EFBIG",
        "said far": "EFBIG",
        "raised": "EPERM",
        "core": [0, 0],
        "unlinked": "EACCES",
        "linked": "EACCES",
        "mounted": "refused",
        "shared memory": True,  # its own, which ends with it
    }


def memory_of(pid: int) -> int:
    """Return the bytes that a process has in memory: none once it has ended with its VMM."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def test_a_vmm_that_says_and_logs_without_an_end_is_bounded_and_ends(tmp_path: Path) -> None:
    """It says so far beyond what has been read that reading up to there takes long, too."""
    with taken_over(tmp_path, b"flood") as vm:
        supervisor = vm._pids()["supervisor"][0]
        deadline = time.monotonic() + 120
        while not (vm.console.exists() and vm.log.exists()):
            assert time.monotonic() < deadline
            assert memory_of(supervisor) < 256 * MIB
            time.sleep(0.05)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert memory_of(supervisor) < 256 * MIB
            time.sleep(0.05)
        began = time.monotonic()
        vm.kill()
        assert time.monotonic() - began < 10
        assert vm.console.stat().st_size <= MIB + 2 * LINE_BYTES
        assert vm.log.stat().st_size <= LOG_BYTES
