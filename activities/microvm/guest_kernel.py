"""What a guest kernel must have, by its own configuration where that is in the image."""

from __future__ import annotations

import mmap
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

INITRD = "initrd.img"
"""Beside `vmlinux.bin`, for a kernel that has its drivers as modules."""
# kernel/configs.c: a gzip between these two, in a kernel with CONFIG_IKCONFIG.
CONFIG_START, CONFIG_END = b"IKCFG_ST", b"IKCFG_ED"
MAX_CONFIG_BYTES = 4 << 20
OPTION = re.compile(r"^CONFIG_(\w+)=([ym])$", re.MULTILINE)

# What no guest can do without. Each entry is enough by any of its options.
BUILT_IN = (
    ("SERIAL_8250_CONSOLE",),
    ("DEVTMPFS",),
    ("PROC_FS",),
    ("SYSFS",),
    ("TMPFS",),
    ("UNIX",),
    ("INET",),
    ("BINFMT_ELF",),
    ("BINFMT_SCRIPT",),
    ("KVM_GUEST",),  # kvm-clock, the only one that can be moved on at a resume
    ("VIRTIO_MMIO_CMDLINE_DEVICES", "ACPI"),  # how Firecracker tells of its devices
)
# As modules they will do when an initrd loads them.
DRIVERS = (("VIRTIO_MMIO",), ("VIRTIO_BLK",), ("VIRTIO_NET",), ("EXT4_FS",))
# Guests do without, less well.
WANTED = {
    "VMGENID": "resumed guests share the kernel's random numbers",
    "HW_RANDOM_VIRTIO": "guests have less randomness when they boot",
    "CGROUPS": "systemd does not start",
}


@dataclass(frozen=True)
class KernelVerdict:
    """What is to be said of a guest kernel. Options are without their `CONFIG_`."""

    has_config: bool
    missing: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    """What guests do without, and what that means."""


def initrd_of(vmlinux: Path) -> Path | None:
    """Return the initrd that a kernel is booted with, if it has one."""
    initrd = vmlinux.with_name(INITRD)
    return initrd if initrd.exists() else None


def judge_kernel(vmlinux: Path) -> KernelVerdict:
    """Look at a kernel's configuration. Raises OSError."""
    options = kernel_options(vmlinux)
    if options is None:
        return KernelVerdict(has_config=False)
    built_in = {name for name, how in options.items() if how == "y"}
    has_initrd = initrd_of(vmlinux) is not None
    drivers = set(options) if has_initrd else built_in
    needed = [*BUILT_IN, *([("BLK_DEV_INITRD",)] if has_initrd else [])]
    missing = [each for each in needed if built_in.isdisjoint(each)]
    missing += [each for each in DRIVERS if drivers.isdisjoint(each)]
    return KernelVerdict(
        has_config=True,
        missing=tuple(" or ".join(each) for each in missing),
        unwanted=tuple(f"{name}: {why}" for name, why in WANTED.items() if name not in options),
    )


def kernel_options(vmlinux: Path) -> dict[str, str] | None:
    """Return the options that are set, `y` or `m`, without their `CONFIG_`; None if not told.

    Raises OSError.
    """
    packed = _packed_config(vmlinux)
    if packed is None:
        return None
    try:
        text = zlib.decompressobj(wbits=31).decompress(packed, MAX_CONFIG_BYTES)
    except zlib.error:
        return None
    return dict(OPTION.findall(text.decode(errors="replace")))


def _packed_config(vmlinux: Path) -> bytes | None:
    if vmlinux.stat().st_size == 0:
        return None
    with vmlinux.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        start = image.find(CONFIG_START)
        end = image.find(CONFIG_END, start)
        if start < 0 or end < 0:
            return None
        return image[start + len(CONFIG_START) : min(end, start + MAX_CONFIG_BYTES)]
