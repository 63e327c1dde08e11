"""The QEMU process behind one VM."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .config import DEFAULT_BOOT_ARGS, VmConfig, find_kernel
from .memory import GuestMemory
from .mmds import Service
from .qmp import Qmp
from .schema import Json
from .snapfile import HostTraits

QEMU = "qemu-system-x86_64"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

# An emulated CPU is too slow and too irregular for the kernel to calibrate its clocks with: on a
# busy machine the guest hangs there.
_TCG_BOOT_ARGS = "tsc=reliable lpj=10000000 no_timer_check"


_ACCELERATOR_VARIABLE = "TEMPLATE_MANAGER_QEMU_ACCEL"
# Of guest code that is translated: QEMU's own default of 1 GiB is more than a VMM may take besides
# its guest's memory (`VM_OVERHEAD_MB`), and a guest that runs for a minute filled as much.
_TCG_CODE_MB = 96
# CPU model and kernel arguments. With x2apic a guest on `-cpu max` hangs.
_ACCELERATORS = {"tcg": ("max,-x2apic", _TCG_BOOT_ARGS), "kvm": ("host", "")}


@dataclass(frozen=True)
class Accelerator:
    """How QEMU runs guest code."""

    name: str
    cpu: str
    boot_args: str

    @classmethod
    def chosen(cls) -> Accelerator:
        """TCG unless asked otherwise: a /dev/kvm that opens may still hang the guest."""
        name = os.environ.get(_ACCELERATOR_VARIABLE, "tcg")
        if name not in _ACCELERATORS:
            raise ValueError(f"{_ACCELERATOR_VARIABLE}={name}: use one of {list(_ACCELERATORS)}")
        return cls(name, *_ACCELERATORS[name])

    @property
    def options(self) -> str:
        """What `-accel` says."""
        return f"tcg,tb-size={_TCG_CODE_MB}" if self.name == "tcg" else self.name

    def traits(self, qemu_version: str) -> HostTraits:
        """What a snapshot that is made here depends on."""
        cpu = _host_cpu() if self.cpu == "host" else self.cpu
        return HostTraits(qemu_version, self.name, cpu)


class Qemu:
    """A QEMU process that waits for its first `cont`. It never outlives this process.

    Start it in the main thread: the kernel takes a parent's *thread* for the parent.
    """

    def __init__(self, arguments: list[str], fds: tuple[int, ...]) -> None:
        ours, theirs = socket.socketpair()
        control = f"socket,id=qmp,fd={theirs.fileno()}"
        command = [QEMU, *arguments, "-chardev", control, "-mon", "chardev=qmp,mode=control"]
        self._messages = os.memfd_create("qemu-stderr", os.MFD_CLOEXEC)
        self.qmp = Qmp(ours)
        parent = os.getpid()
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=self._messages,
                pass_fds=(*fds, theirs.fileno()),
                # With threads around, no more than a system call may happen before exec.
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 # this program has no other thread here
            )

    def messages(self) -> str:
        """What QEMU had to say on its standard error."""
        size = os.fstat(self._messages).st_size
        return os.pread(self._messages, 4096, max(0, size - 4096)).decode(errors="replace").strip()

    def kill(self) -> None:
        """End the process and wait until it is gone, and with it its hold on TAP and disk."""
        self.process.kill()
        self.process.wait()

    def save_device_state(self) -> bytes:
        """The state of all devices of a stopped VM, without its memory."""
        state = os.memfd_create("device-state", os.MFD_CLOEXEC)
        try:
            # Made for Xen, it works for any machine. Unlike a migration it leaves the VM as it is,
            # and it does without memory.
            name = f"/proc/{os.getpid()}/fd/{state}"
            self.qmp.execute("xen-save-devices-state", filename=name, live=False)
            return os.pread(state, os.fstat(state).st_size, 0)
        finally:
            os.close(state)

    def load_device_state(self, device_state: bytes) -> None:
        """Put a VM that was started with `-incoming defer` into the state that was saved."""
        state = os.memfd_create("device-state", os.MFD_CLOEXEC)
        try:
            os.write(state, device_state)
            os.lseek(state, 0, os.SEEK_SET)
            events = [{"capability": "events", "state": True}]
            self.qmp.execute("migrate-set-capabilities", capabilities=events)
            self.qmp.execute("getfd", fd=state, fdname="state")
            self.qmp.execute("migrate-incoming", uri="fd:state")
            self.qmp.wait_for_migration()
        finally:
            os.close(state)


def machine_arguments(
    config: VmConfig,
    accelerator: Accelerator,
    memory: GuestMemory,
    taps: dict[str, int],
    serial_fd: int,
    metadata: Service | None,
) -> list[str]:
    """QEMU's arguments for a configuration; they must be the same before and after a snapshot."""
    machine = config.machine
    threads = 2 if machine["smt"] and machine["vcpu_count"] > 1 else 1
    backend = (
        f"memory-backend-file,id=memory,size={machine['mem_size_mib']}M,"
        f"mem-path=/proc/self/fd/{memory.fd},share=on"
    )
    arguments = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S"]
    # `xen-save-devices-state` writes no configuration section, so the loading side expects none.
    arguments += ["-global", "migration.send-configuration=off"]
    arguments += ["-M", "microvm,memory-backend=memory", "-accel", accelerator.options]
    arguments += ["-object", backend, "-m", f"{machine['mem_size_mib']}M"]
    arguments += ["-cpu", accelerator.cpu, "-smp", f"{machine['vcpu_count']},threads={threads}"]
    arguments += ["-chardev", f"socket,id=serial,fd={serial_fd}", "-serial", "chardev:serial"]
    # Ctrl+Alt+Del and `reboot=k` go through the keyboard controller.
    arguments += ["-device", "i8042"]
    return arguments + _device_arguments(config, taps, metadata)


def boot_arguments(config: VmConfig, accelerator: Accelerator, tsc_khz: int | None) -> list[str]:
    """QEMU's arguments for a cold start: kernel, initrd, command line."""
    assert config.boot_source is not None
    kernel, initrd = find_kernel(config.boot_source)
    given = (config.boot_source.get("boot_args") or DEFAULT_BOOT_ARGS).split()
    # The virtio drivers of this kernel are modules, so it must be able to load them.
    words = [word for word in given if word != "nomodule"]
    for drive in config.drives[:1]:
        if drive["is_root_device"]:
            words += ["root=/dev/vda", "ro" if drive["is_read_only"] else "rw"]
    words += accelerator.boot_args.split()
    if tsc_khz is not None:
        words.append(f"tsc_early_khz={tsc_khz}")
    return ["-kernel", str(kernel), "-initrd", str(initrd), "-append", " ".join(words)]


def _device_arguments(
    config: VmConfig, taps: dict[str, int], metadata: Service | None
) -> list[str]:
    devices: list[str] = []
    for number, drive in enumerate(config.drives):
        devices += _drive_arguments(number, drive)
    for number, interface in enumerate(config.interfaces):
        name = f"net-{interface['iface_id']}"
        devices += ["-netdev", f"tap,id={name},fd={taps[interface['iface_id']]}"]
        mmds = config.mmds
        if mmds and metadata and interface["iface_id"] in mmds["network_interfaces"]:
            devices += metadata.netdevs(mmds, name, (2 * number, 2 * number + 1))
            name = f"{name}-port"
        devices += ["-device", f"virtio-net-device,netdev={name},mac={interface['guest_mac']}"]
    if config.entropy is not None:
        devices += ["-device", "virtio-rng-device"]
    return devices


def _drive_arguments(number: int, drive: Json) -> list[str]:
    name = f"drive{number}"
    # Locks would keep a new VM from a disk that a dying one still holds; Firecracker has none.
    options = f"id={name},if=none,format=raw,aio=threads,file.locking=off"
    options += f",cache={'unsafe' if drive['cache_type'] == 'Unsafe' else 'writeback'}"
    options += f",readonly={'on' if drive['is_read_only'] else 'off'}"
    options += f",file={_escape(drive['path_on_host'])}"
    serial = drive["drive_id"][:20]
    return ["-drive", options, "-device", f"virtio-blk-device,drive={name},serial={serial}"]


def _die_with(parent: int) -> None:
    """In the child: have the kernel kill QEMU when its parent is gone, however that happens."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _escape(path: str) -> str:
    """A path as a value in QEMU's comma-separated options; `./` keeps `nbd:x` from being a URL."""
    return (path if path.startswith("/") else f"./{path}").replace(",", ",,")


def _host_cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
