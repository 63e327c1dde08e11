"""What a guest does when it finds that it is another machine now, in a real kernel with VMGenID.

The stand-in for Firecracker has no VMGenID: QEMU has it only for machines with ACPI and a BIOS. So
this boots a kernel in such a machine, with our script and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import guest_kernel
import pytest
from devstack.environment import state_dir

from activities.rootfs.guest_files import GUEST_FILES
from tests.support.initrd import pack_initrd

pytestmark = pytest.mark.counts_host

BUSYBOX = Path("/bin/busybox")
BOOT_ID = "0" * 32
INIT = f"""#!/.template/busybox sh
b=/.template/busybox
$b mkdir -p /proc /dev /.template/run
$b mount -t proc proc /proc
$b mount -t devtmpfs devtmpfs /dev
echo {BOOT_ID} >/etc/machine-id
exec >/dev/ttyS0 2>&1
# The kernel says nothing of a fork before its random numbers are good.
until [ "$($b cat /proc/sys/kernel/random/entropy_avail)" -ge 256 ]; do $b usleep 100000; done
$b sh /.template/on-fork.sh /dev/kmsg &
while :; do
    echo "id $($b cat /etc/machine-id)"
    $b usleep 200000
done
"""


class Guest:
    """A QEMU with VMGenID, whose standard input is its monitor."""

    def __init__(self, directory: Path, kernel: Path, initrd: Path, *more: str) -> None:
        self._console = directory / f"console-{time.monotonic_ns()}"
        command = [
            "qemu-system-x86_64",
            "-M",
            "pc",
            "-accel",
            "tcg",
            "-cpu",
            "max,-x2apic",
            "-m",
            "256",
        ]
        command += ["-nodefaults", "-nographic", "-device", "vmgenid,guid=auto"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-monitor", "stdio"]
        command += ["-append", "console=ttyS0 quiet panic=-1", "-serial", f"file:{self._console}"]
        self._process = subprocess.Popen(
            [*command, *more], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def ids(self) -> list[str]:
        """The machine ids that it has told, in order."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return re.findall(r"^id ([0-9a-f]{32})\r?$", text, re.MULTILINE)

    def until_id(self, expected: re.Pattern[str], limit_seconds: float = 60) -> str:
        """Wait until the latest id is as expected."""
        deadline = time.monotonic() + limit_seconds
        while not (ids := self.ids()) or not expected.fullmatch(ids[-1]):
            assert self._process.poll() is None
            assert time.monotonic() < deadline, ids[-1:]
            time.sleep(0.1)
        return ids[-1]

    def order(self, *commands: str) -> None:
        """Give the monitor commands; it carries out one after the other."""
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{command}\n" for command in commands).encode())
        self._process.stdin.flush()

    def save(self, path: Path) -> None:
        """Write a snapshot, and end."""
        self.order(f'migrate "exec:cat >{path}"', "quit")
        self._process.wait(60)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def guest(directory: Path, kernel: Path, initrd: Path, *more: str) -> Iterator[Guest]:
    running = Guest(directory, kernel, initrd, *more)
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
def kernel() -> Path:
    """Debian's usual kernel, kept for the next time: its cloud kernel has no VMGenID."""
    package = guest_kernel.concrete_package("linux-image-amd64")
    kept = state_dir() / "kernels-of-tests" / package
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:
            unpacked = guest_kernel.download_and_unpack(package, Path(place))
            (unpacked / "boot" / package.replace("linux-image", "vmlinuz")).rename(kept)
    return kept


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    for name in (".template", "etc"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / ".template" / "busybox")
    shutil.copy(GUEST_FILES / "on-fork.sh", tree / ".template")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    path = tmp_path / "initrd.img"
    pack_initrd(tree, path)
    return path


def test_two_vms_of_one_snapshot_have_different_machine_ids(
    tmp_path: Path, kernel: Path, initrd: Path
) -> None:
    saved = tmp_path / "saved"
    with guest(tmp_path, kernel, initrd) as first:
        first.until_id(re.compile(BOOT_ID))
        first.save(saved)
    assert set(first.ids()) == {BOOT_ID}
    other = re.compile(f"(?!{BOOT_ID})[0-9a-f]{{32}}")
    incoming = ("-incoming", f"exec:cat {saved}")
    with (
        guest(tmp_path, kernel, initrd, *incoming) as one,
        guest(tmp_path, kernel, initrd, *incoming) as two,
    ):
        ids = [each.until_id(other) for each in (one, two)]
        assert ids[0] != ids[1]
        time.sleep(2)
        assert [each.ids()[-1] for each in (one, two)] == ids  # once a fork


def test_what_a_program_writes_into_the_kernels_messages_changes_nothing(tmp_path: Path) -> None:
    """The same in a container of nothing: only the kernel's own words count."""
    root = tmp_path / "root"
    for name in (".template", "etc", "proc/sys/kernel/random"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / ".template" / "busybox")
    shutil.copy(GUEST_FILES / "on-fork.sh", root / ".template")
    (root / "proc/sys/kernel/random/uuid").write_text("11111111-2222-3333-4444-555555555555\n")
    (root / "etc/machine-id").write_text(BOOT_ID)
    os.mkfifo(root / "kmsg")
    fork = "random: crng reseeded due to virtual machine fork"
    script = ["/.template/busybox", "sh", "/.template/on-fork.sh", "/kmsg"]
    running = subprocess.Popen(["chroot", root, *script], start_new_session=True)

    def tell(*lines: str) -> str:
        (root / "kmsg").write_text("".join(f"{line}\n" for line in lines))
        time.sleep(0.5)
        return (root / "etc/machine-id").read_text().strip()

    try:
        assert tell(f"12,1,5,-;{fork}", "5,2,6,-;random: crng init done", fork) == BOOT_ID
        assert tell(f"5,3,7,-;{fork}") == "11111111222233334444555555555555"
        (root / "etc/machine-id").write_text("kept")
        time.sleep(1.2)  # it opens the messages again, and the same ones are told again
        assert tell(f"5,3,7,-;{fork}") == "kept"
    finally:
        os.killpg(running.pid, 9)
        running.wait()
