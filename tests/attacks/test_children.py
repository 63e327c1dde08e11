"""What reads a tenant's disk or tree has no rights, ends in time, and ends with its worker."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from devstack.environment import REPOSITORY

from activities.contract.errors import FilesystemDamagedError
from activities.disk.cgroups import PARENT, Limits, cgroup_of, host_trees
from activities.disk.child_cgroups import child_cgroups, leftover_child_cgroups
from activities.disk.ext4 import check_filesystem
from activities.disk.limited_child import (
    PROCESSES,
    READS_ANY,
    ChildEnd,
    ChildLimits,
    ChildTimeoutError,
    run_limited,
)
from tests.support.process_ends import is_alive
from tests.support.step_checks import Stopped, go_on, stop_at

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

LIMITS = ChildLimits(seconds=30, memory_mb=256, file_bytes=1 << 20)
GIB = 1 << 30
# Of cgroups of 64 MiB, in version 1 and in version 2.
SWAP_LIMITS = {"memory.memsw.limit_in_bytes": str(64 << 20), "memory.swap.max": "0"}


def run_python(
    code: str, limits: ChildLimits = LIMITS, capabilities: tuple[str, ...] = ()
) -> ChildEnd:
    command = ["/usr/bin/python3", "-I", "-S", "-c", code]
    return run_limited(command, limits, go_on, capabilities=capabilities)


def limited_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "unshare"]


def test_a_child_is_nobody_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATE_MANAGER_SECRET_KEYS", "k1:secret")
    status = run_python("print(open('/proc/self/status').read())", capabilities=READS_ANY)
    lines = [line.split(":\t", 1) for line in status.output.decode().splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert set(rows["Uid"].split()) == set(rows["Gid"].split()) == {"65534"}
    assert rows["Groups"].strip() == ""
    assert rows["NoNewPrivs"] == "1"
    sets = {rows[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert sets == {f"{1 << 2:016x}"}  # CAP_DAC_READ_SEARCH
    environment = run_python("import os; print(sorted(os.environ))").output
    assert environment == b"['LC_ALL', 'MALLOC_ARENA_MAX', 'PATH']\n"


def test_a_child_reaches_no_network() -> None:
    code = "print([line.split(':')[0].strip() for line in open('/proc/net/dev')][2:])"
    assert run_python(code).output == b"['lo']\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.fork()", b"BlockingIOError"),
        ("import threading; threading.Thread(target=print).start()", b"can't start new thread"),
        ("bytearray(1 << 29)", b"MemoryError"),
        ("import os; os.truncate(os.memfd_create('x'), 1 << 21)", b"File too large"),
        ("open('/etc/shadow')", b"PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", b""),
    ],
    ids=["process", "thread", "memory", "file", "secrets", "others"],
)
def test_a_child_does_no_more_than_it_may(code: str, error: bytes) -> None:
    end = run_python(f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{code}")
    assert end.code != 0 or not error
    assert error in end.errors


STARTS_THREADS = (
    "import threading\n"
    "over = threading.Event()\n"
    "begun = 0\n"
    "try:\n"
    "    while begun < 64:\n"
    "        threading.Thread(target=over.wait).start()\n"
    "        begun += 1\n"
    "except RuntimeError:\n"
    "    pass\n"
    "over.set()\n"
    "print(begun)\n"
)


@pytest.mark.parametrize(
    ("threads", "memory_mb"),
    [(8, 1024), pytest.param(32, 512, id="many, with addresses for their stacks and little more")],
)
def test_a_child_that_may_start_threads_starts_no_more(threads: int, memory_mb: int) -> None:
    most = replace(LIMITS, memory_mb=memory_mb, threads=threads)
    begun = int(run_python(STARTS_THREADS, most).output)
    assert most.threads <= begun <= most.threads + PROCESSES


def test_a_child_ends_at_its_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(ChildTimeoutError, match="within 1 s"):
        run_python("import time; time.sleep(60)", ChildLimits(seconds=1))
    assert time.monotonic() - began < 5
    assert limited_children() == []


def test_an_endless_output_takes_no_memory() -> None:
    code = "import sys\nwhile True: sys.stdout.write('x' * 65536); sys.stderr.write('y' * 65536)"
    before = psutil.Process().memory_info().rss
    with pytest.raises(ChildTimeoutError):
        run_python(code, ChildLimits(seconds=3))
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_files_in_memory_are_counted_as_well() -> None:
    """They are no address space: a child took all of the machine's memory by them."""
    code = (
        "import os\n"
        "file = os.memfd_create('x')\n"
        "for _ in range(1 << 10): os.write(file, bytes(1 << 20))\n"
        "print('a whole GiB')\n"
    )
    limits = ChildLimits(seconds=60, memory_mb=128)
    end = run_python(code, limits)
    assert end.code != 0
    assert end.output == b""  # killed, without a word


def test_a_child_has_cgroups_of_its_own() -> None:
    code = "print(open('/proc/self/cgroup').read())"
    lines = run_python(code).output.decode().split()
    groups = {path for _, _, path in (line.split(":", 2) for line in lines)}
    [name] = {Path(path).name for path in groups if Path(path).parent.name == PARENT}
    for controller in ("memory", "pids"):
        assert any(controller in line and line.endswith(name) for line in lines) or (
            f"0::/{PARENT}/{name}" in lines  # of version 2: one for all
        )
    assert not [group for tree in host_trees() if (group := cgroup_of(tree, name)).exists()]


def test_a_child_has_no_swap_beyond_its_memory() -> None:
    with child_cgroups(Limits(memory_mb=64, processes=4)) as made:
        files = [file for group in made for file in group.glob("memory.*")]
        values = {f.name: f.read_text().strip() for f in files if f.name in SWAP_LIMITS}
    assert values
    assert values.items() <= SWAP_LIMITS.items()


def test_the_cgroups_of_a_child_whose_worker_has_died_are_swept() -> None:
    """With whatever has outlived it; those of a worker that lives stay."""
    code = (
        "import os, subprocess, sys, time\n"
        "from activities.disk.cgroups import Limits\n"
        "from activities.disk.child_cgroups import child_cgroups, joining\n"
        "with child_cgroups(Limits(memory_mb=64, processes=4)) as made:\n"
        "    child = subprocess.Popen(joining(made, ['sleep', '1000']), stdout=sys.stderr)\n"
        "    while not (made[0] / 'cgroup.procs').read_text(): time.sleep(0.01)\n"
        "    print(made[0].name, child.pid, flush=True); time.sleep(1000)\n"
    )
    with worker_that_runs(code) as worker:
        assert worker.stdout is not None
        name, pid = worker.stdout.readline().split()
        child = psutil.Process(int(pid))
        assert name.decode() not in {left.name for left in leftover_child_cgroups()}
        worker.kill()
        worker.wait(10)
        assert is_alive(child)
        for left in leftover_child_cgroups():
            if left.name == name.decode():
                left.remove()
        assert not is_alive(child)
        assert not [tree for tree in host_trees() if cgroup_of(tree, name.decode()).exists()]


@contextmanager
def worker_that_runs(code: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as worker:
        try:
            yield worker
        finally:
            worker.kill()


@pytest.mark.parametrize("asked", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_a_child_ends_with_its_worker(asked: signal.Signals) -> None:
    code = (
        "from activities.disk.limited_child import *\n"
        "with limited_child(['sleep', '1000'], ChildLimits(1000)) as child:\n"
        "    print(child.pid, flush=True); child.wait()\n"
    )
    with worker_that_runs(code) as worker:
        assert worker.stdout is not None
        child = psutil.Process(int(worker.stdout.readline()))
        below = wait_for_sleep(child)
        os.kill(worker.pid, asked)
        worker.wait(10)
        deadline = time.monotonic() + 5
        while any(map(is_alive, [child, *below])) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(is_alive, [child, *below]))
    for left in leftover_child_cgroups():
        left.remove()


def wait_for_sleep(child: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        below = child.children(recursive=True)
        if any(process.name() == "sleep" for process in below):
            return below
        time.sleep(0.01)
    raise AssertionError("the child did not start")


@pytest.fixture
def endless_disk(tmp_path: Path) -> Path:
    """As a guest may write it: 50 million inodes to look at, all in use for all that is said."""
    disk = tmp_path / "rootfs.ext4"
    with disk.open("wb") as file:
        file.truncate(16 * GIB)
    features = "none,ext_attr,filetype,extent,64bit,flex_bg,sparse_super,large_file"
    options = "assume_storage_prezeroed=1,lazy_itable_init=0,nodiscard"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-E", options, "-m", "0"]
    subprocess.run([*command, "-N", "50000000", disk], check=True)
    with disk.open("r+b") as file:
        superblock = os.pread(file.fileno(), 1024, 1024)
        [blocks] = struct.unpack_from("<I", superblock, 4)
        [per_group] = struct.unpack_from("<I", superblock, 32)
        for group in range(-(-blocks // per_group)):  # bg_used_dirs_count: the most there can be
            os.pwrite(file.fileno(), b"\xff\xff", 4096 + group * 64 + 0x10)
    return disk


def test_the_check_of_a_guests_disk_ends_when_it_is_told_to(endless_disk: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Stopped):
        check_filesystem(endless_disk, stop_at(10))
    with pytest.raises(FilesystemDamagedError, match="did not end within 1 s"):
        check_filesystem(endless_disk, go_on, limits=ChildLimits(seconds=1, memory_mb=2048))
    assert time.monotonic() - began < 10
    assert limited_children() == []
    assert endless_disk.stat().st_mode & 0o777 == 0o644


def test_the_check_of_a_guests_disk_has_little_memory(endless_disk: Path) -> None:
    with pytest.raises(FilesystemDamagedError):
        check_filesystem(endless_disk, go_on, limits=ChildLimits(seconds=60, memory_mb=64))
