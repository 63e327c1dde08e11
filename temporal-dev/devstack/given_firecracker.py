"""Firecracker itself, where a machine has it: named by the environment, and never fetched.

`FIRECRACKER_BINARY`, of which this is the first (with `:` between several), `JAILER_BINARY`, if VMs
are to be jailed, and `GUEST_KERNEL_DIR`, which has a `vmlinux.bin` that this machine can run (of
one CPU, it may be). A guest may take minutes to boot there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from devstack.environment import FIRECRACKER_VERSION

KERNEL_VERSION = "vmlinux-given"
SLOW_SECONDS = 900.0
RESUME_SECONDS = 600.0
# Where KVM emulates the guest's kernel, that kernel may save less of a process's registers than its
# programs see and glibc uses (docs/firecracker.md): those of two processes get mixed up. A kernel
# gives such an argument to its init, as a variable.
NO_AVX = "GLIBC_TUNABLES=glibc.cpu.hwcaps=" + ",".join(
    f"-{name}"
    for name in (
        *("AVX", "AVX2", "AVX512F", "AVX512BW", "AVX512VL"),
        *("AVX_Fast_Unaligned_Load", "XSAVE", "XSAVEC"),
    )
)


@dataclass(frozen=True)
class GivenFirecracker:
    """One version of it, with a kernel."""

    binary: Path
    kernel_dir: Path
    jailer: Path | None = None

    @classmethod
    def named(cls) -> Self | None:
        """Return what the environment names; None when it names none."""
        binary, jailer = (
            Path(found[0]).resolve() if (found := os.environ.get(name, "").split(":"))[0] else None
            for name in ("FIRECRACKER_BINARY", "JAILER_BINARY")
        )
        kernel_dir = os.environ.get("GUEST_KERNEL_DIR")
        return cls(binary, Path(kernel_dir).resolve(), jailer) if binary and kernel_dir else None

    def install(self, place: Path, *, jailed: bool) -> tuple[Path, Path]:
        """Lay kernel and binary out as a host has them; returns the two directories."""
        kernel = place / "kernels" / KERNEL_VERSION
        kernel.parent.mkdir(parents=True)
        kernel.symlink_to(self.kernel_dir)
        binary = place / "versions" / FIRECRACKER_VERSION / "firecracker"
        binary.parent.mkdir(parents=True)
        binary.symlink_to(self.binary)
        if jailed and self.jailer is not None:
            binary.with_name("jailer").symlink_to(self.jailer)
        return kernel.parent, binary.parent.parent

    def settings(self, place: Path) -> dict[str, str]:
        """Install it there, with its jailer if given; returns the settings of hosts that use it."""
        kernels, versions = self.install(place, jailed=self.jailer is not None)
        return {
            # A slow guest is not tried ever again.
            "BUILD": json.dumps({"ready_timeout_seconds": SLOW_SECONDS, "retry_attempts": 2}),
            "KERNEL_ARGUMENTS": NO_AVX,
            "RESUME_SECONDS": str(RESUME_SECONDS),
            "KERNELS_DIR": str(kernels),
            "DEFAULT_KERNEL_VERSION": KERNEL_VERSION,
            "FIRECRACKER_DIR": str(versions),
            "DEFAULT_FIRECRACKER_VERSION": FIRECRACKER_VERSION,
        }
