"""Firecracker itself, where a machine has it: named by the environment, and never fetched.

`FIRECRACKER_BINARY`, and `GUEST_KERNEL_DIR`, which has a `vmlinux.bin` that this machine's KVM can
run (of one CPU, it may be). A guest may take minutes to boot there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from devstack.environment import FIRECRACKER_VERSION

from tests.support.vm_host import VmHost, vm_host

KERNEL_VERSION = "vmlinux-given"
STAND_IN = "the stand-in"
JAILED, FILTERED, UNJAILED = "in its jailer", "in its jailer, filtered", "without its jailer"
TEST_SECONDS = 1800
MEMORY_MB = 128
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
IMAGE_CONFIG = {"Env": [NO_AVX]}
"""Of images whose commands real Firecracker's guests run."""
MISSING = (
    "NOTHING WAS SHOWN ON REAL FIRECRACKER: FIRECRACKER_BINARY and GUEST_KERNEL_DIR are not set"
)


@dataclass(frozen=True)
class RealFirecracker:
    """One version of it, with a kernel."""

    binary: Path
    kernel_dir: Path
    jailer: Path | None = None

    @classmethod
    def given(cls) -> RealFirecracker:
        """Return what the environment names; skips the test when it names none."""
        binary, kernel_dir = (os.environ.get(n) for n in ("FIRECRACKER_BINARY", "GUEST_KERNEL_DIR"))
        if not binary or not kernel_dir:
            pytest.skip(MISSING)
        jailer = os.environ.get("JAILER_BINARY")
        found = Path(jailer).resolve() if jailer else None
        return cls(Path(binary).resolve(), Path(kernel_dir).resolve(), found)

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        said = subprocess.check_output([self.binary, "--version"], text=True)
        major, minor, *_ = said.split()[1].removeprefix("v").split(".")
        return int(major), int(minor)

    def install(self, place: Path, *, jailed: bool = False) -> tuple[Path, Path]:
        """Lay kernel and binary out as a host has them; returns the two directories."""
        kernel = place / "kernels" / KERNEL_VERSION
        kernel.parent.mkdir(parents=True)
        kernel.symlink_to(self.kernel_dir)
        binary = place / "versions" / FIRECRACKER_VERSION / "firecracker"
        binary.parent.mkdir(parents=True)
        binary.symlink_to(self.binary)
        if jailed:
            if self.jailer is None:
                pytest.skip("NOTHING WAS SHOWN IN THE JAILER: JAILER_BINARY is not set")
            binary.with_name("jailer").symlink_to(self.jailer)
        return kernel.parent, binary.parent.parent

    @asynccontextmanager
    async def host(
        self, place: Path, data_dir: Path | None = None, *, jailed: bool = False, **settings: Any
    ) -> AsyncIterator[VmHost]:
        """Have a host with it for a block; nothing of it is left at the end."""
        kernels, versions = self.install(place, jailed=jailed)
        async with vm_host(
            data_dir or place / "data",
            kernels_dir=kernels,
            firecracker_dir=versions,
            kernel_arguments=NO_AVX,
            resume_seconds=RESUME_SECONDS,
            **settings,
        ) as host:
            host.shape = host.shape.model_copy(
                update={"kernel_version": KERNEL_VERSION, "memory_mb": MEMORY_MB}
            )
            host.ready_seconds = SLOW_SECONDS
            yield host


def config_for(host: VmHost) -> dict[str, Any]:
    """Return the config of an image whose commands that host's guests run."""
    return IMAGE_CONFIG if host.settings.kernel_arguments == NO_AVX else {}


def on_both(*kinds: str) -> list[Any]:
    """Return kinds of host for a test that runs on the stand-in, and so on the real one."""
    return [STAND_IN, *on_real(*kinds)]


def on_real(*kinds: str) -> list[Any]:
    """Return kinds of host with real Firecracker for a test."""
    real = [pytest.mark.real_firecracker, pytest.mark.timeout(TEST_SECONDS)]
    return [
        pytest.param(kind, marks=real if kind == UNJAILED else [*real, pytest.mark.jailed])
        for kind in kinds
    ]


@asynccontextmanager
async def host_of(kind: str, place: Path) -> AsyncIterator[VmHost]:
    """Have a host of that kind, with a data directory as long and as closed as any."""
    # Longer than a socket's path may be, and closed to everybody else.
    data = place / ("long-" * 20) / "data"
    data.mkdir(parents=True)
    data.chmod(0o700)
    if kind == STAND_IN:
        async with vm_host(data) as host:
            yield host
    else:
        real = RealFirecracker.given()
        async with real.host(place, data, jailed=kind != UNJAILED) as host:
            yield host
