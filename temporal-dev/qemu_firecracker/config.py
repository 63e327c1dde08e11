"""The configuration of one VM, and what may not be configured."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

from .errors import Fault, unsupported
from .mmds import checked_config
from .schema import Json

_VCPUS_MAX = 32
_COMMAND_LINE_BYTES_MAX = 2048
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")
_DEFAULT_MACHINE: Json = {
    "vcpu_count": 1,
    "mem_size_mib": 128,
    "smt": False,
    "track_dirty_pages": False,
    "huge_pages": "None",
}
# What `/vm/config` shows of what was not given.
_BOOT_SOURCE: Json = {"kernel_image_path": "", "initrd_path": None, "boot_args": None}
_DRIVE: Json = {
    "drive_id": "",
    "partuuid": None,
    "is_root_device": False,
    "cache_type": "Unsafe",
    "is_read_only": False,
    "path_on_host": None,
    "rate_limiter": None,
    "io_engine": "Sync",
    "socket": None,
}
_INTERFACE: Json = {
    "iface_id": "",
    "host_dev_name": "",
    "guest_mac": None,
    "rx_rate_limiter": None,
    "tx_rate_limiter": None,
}
DEFAULT_BOOT_ARGS = (
    "reboot=k panic=1 pci=off nomodule 8250.nr_uarts=0 "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
)


class VmConfig:
    """What `/vm/config` shows: the parts as the client gave them, checked."""

    def __init__(self) -> None:
        self.boot_source: Json | None = None
        self.machine: Json = dict(_DEFAULT_MACHINE)
        self.drives: list[Json] = []
        self.interfaces: list[Json] = []
        self.entropy: Json | None = None
        self.mmds: Json | None = None

    def to_json(self) -> Json:
        """The configuration in the form of `/vm/config` and of the snapshot file."""
        return {
            "balloon": None,
            "drives": [{**_DRIVE, **drive} for drive in self.drives],
            "boot-source": {**_BOOT_SOURCE, **(self.boot_source or {})},
            "cpu-config": None,
            "logger": None,
            "machine-config": self.machine,
            "metrics": None,
            "mmds-config": self.mmds,
            "network-interfaces": [{**_INTERFACE, **each} for each in self.interfaces],
            "vsock": None,
            "entropy": None if self.entropy is None else {"rate_limiter": None},
            "pmem": [],
            "memory-hotplug": None,
        }

    @classmethod
    def from_json(cls, stored: Json) -> VmConfig:
        """The configuration in a snapshot file."""
        config = cls()
        config.boot_source = stored["boot-source"]
        config.machine = stored["machine-config"]
        config.drives = stored["drives"]
        config.interfaces = stored["network-interfaces"]
        config.entropy = stored["entropy"]
        config.mmds = stored["mmds-config"]
        return config

    def set_boot_source(self, source: Json) -> None:
        """Take the kernel and its arguments."""
        find_kernel(source)
        if len(source.get("boot_args", "")) >= _COMMAND_LINE_BYTES_MAX:
            raise Fault("Boot source error: The kernel command line is invalid: too long")
        self.boot_source = source

    def update_machine(self, update: Json) -> None:
        """Take over some or all machine settings, or none if one of them is bad."""
        machine = {**self.machine, **update}
        vcpus, memory_mib = machine["vcpu_count"], machine["mem_size_mib"]
        odd = machine["smt"] and vcpus > 1 and vcpus % 2 == 1
        if not 0 < vcpus <= _VCPUS_MAX or odd:
            raise Fault(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 "
                "and must be 1 or an even number if SMT is enabled."
            )
        if memory_mib == 0:
            raise Fault("Machine config error: The memory size (MiB) is invalid.")
        _refuse_machine_features(machine)
        self.machine = machine

    def put_drive(self, drive: Json) -> None:
        """Add a drive, or replace the one with its id. The root device stays first."""
        _refuse_drive_features(drive)
        if "path_on_host" not in drive:
            raise Fault(
                "Drive config error: Unable to create the virtio block device: "
                "Invalid block config."
            )
        roots = [other["drive_id"] for other in self.drives if other["is_root_device"]]
        if drive["is_root_device"] and roots and roots != [drive["drive_id"]]:
            raise Fault("Drive config error: A root block device already exists!")
        drive = {**_DRIVE, **drive}
        check_drive_file(drive)
        self.drives = _put(self.drives, "drive_id", drive)
        self.drives.sort(key=lambda each: not each["is_root_device"])

    def check_interface(self, interface: Json) -> None:
        """Refuse an interface that cannot be or clashes with another one."""
        _refuse_rate_limiters(interface)
        mac = interface.get("guest_mac")
        if mac is not None and not _MAC.fullmatch(mac):
            raise Fault(
                "An error occurred when deserializing the json body of a request: "
                f"guest_mac: invalid MAC address `{mac}`."
            )
        for other in self.interfaces:
            if other["iface_id"] != interface["iface_id"] and mac and mac == other.get("guest_mac"):
                raise Fault(f"Network config error: The MAC address is already in use: {mac}")

    def put_interface(self, interface: Json) -> None:
        """Add a network interface, or replace the one with its id."""
        interface.setdefault("guest_mac", _random_mac())
        self.interfaces = _put(self.interfaces, "iface_id", interface)

    def set_entropy(self, entropy: Json) -> None:
        """Give the guest an entropy device."""
        _refuse_rate_limiters(entropy)
        self.entropy = entropy

    def set_mmds(self, mmds: Json) -> None:
        """Let the guest reach the metadata service."""
        self.mmds = checked_config(mmds, [each["iface_id"] for each in self.interfaces])


def find_kernel(source: Json) -> tuple[Path, Path]:
    """The kernel, and the initrd that is named or is beside it."""
    try:
        kernel = Path(source["kernel_image_path"]).resolve(strict=True)
    except OSError as error:
        raise Fault(f"Boot source error: The kernel file cannot be opened: {error}") from None
    if "initrd_path" in source:
        return kernel, _openable_initrd(source["initrd_path"])
    initrd = kernel.with_name("initrd.img")
    if not initrd.is_file():
        raise Fault(
            f"Boot source error: The kernel file cannot be opened: the QEMU stand-in for "
            f"Firecracker boots {kernel.name} with the initrd beside it, but there is no {initrd}"
        )
    return kernel, initrd


def _openable_initrd(path: str) -> Path:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise Fault(
            "Boot source error: The initrd file cannot be opened due to invalid path or invalid "
            f"permissions. {error.strerror} (os error {error.errno})"
        ) from None
    return Path(path)


def check_drive_file(drive: Json) -> None:
    """Refuse a drive whose file cannot be opened as the guest will use it."""
    path = drive["path_on_host"]
    try:
        os.close(os.open(path, os.O_RDONLY if drive["is_read_only"] else os.O_RDWR))
    except OSError as error:
        raise Fault(
            "Drive config error: Unable to create the virtio block device: Virtio backend error: "
            f"Error manipulating the backing file: {error.strerror} (os error {error.errno}) {path}"
        ) from None


def _refuse_machine_features(machine: Json) -> None:
    if machine["huge_pages"] != "None":
        raise unsupported(
            "huge_pages",
            "a snapshot on huge pages can only be loaded with a page-fault handler, "
            "Firecracker itself refuses to load it from a file",
        )
    if machine["track_dirty_pages"]:
        raise unsupported("track_dirty_pages", "it makes full snapshots only")
    if machine.get("cpu_template", "None") != "None":
        raise unsupported("cpu_template")


def _refuse_drive_features(drive: Json) -> None:
    _refuse_rate_limiters(drive)
    if drive.get("io_engine") == "Async":
        raise unsupported("io_engine Async")
    for feature in ("socket", "partuuid"):
        if feature in drive:
            raise unsupported(feature)


def _refuse_rate_limiters(device: Json) -> None:
    for feature in ("rate_limiter", "rx_rate_limiter", "tx_rate_limiter"):
        if feature in device:
            raise unsupported(feature)


def _random_mac() -> str:
    octets = [0x02, *(random.randrange(256) for _ in range(5))]
    return ":".join(f"{octet:02x}" for octet in octets)


def _put(devices: list[Json], key: str, device: Json) -> list[Json]:
    """The devices with one more, or with the one of that id replaced."""
    ids = [other[key] for other in devices]
    if device[key] not in ids:
        return [*devices, device]
    return [device if other[key] == device[key] else other for other in devices]
