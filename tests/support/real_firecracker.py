"""Firecracker itself for tests, or a loud skip where a machine has none (see `devstack`)."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from devstack.given_firecracker import (
    KERNEL_VERSION,
    NO_AVX,
    RESUME_SECONDS,
    SLOW_SECONDS,
    GivenFirecracker,
)

from tests.support.vm_host import VmHost, vm_host

STAND_IN = "the stand-in"
JAILED, FILTERED, UNJAILED = "in its jailer", "in its jailer, filtered", "without its jailer"
TEST_SECONDS = 1800
MEMORY_MB = 128
IMAGE_CONFIG = {"Env": [NO_AVX]}
"""Of images whose commands real Firecracker's guests run."""
MISSING = (
    "NOTHING WAS SHOWN ON REAL FIRECRACKER: FIRECRACKER_BINARY and GUEST_KERNEL_DIR are not set"
)


class RealFirecracker(GivenFirecracker):
    """One version of it, with a kernel."""

    @classmethod
    def given(cls) -> RealFirecracker:
        """Return what the environment names; skips the test when it names none."""
        if (named := cls.named()) is None:
            pytest.skip(MISSING)
        return named

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        said = subprocess.check_output([self.binary, "--version"], text=True)
        major, minor, *_ = said.split()[1].removeprefix("v").split(".")
        return int(major), int(minor)

    def install(self, place: Path, *, jailed: bool = False) -> tuple[Path, Path]:
        """Do as everywhere; skips the test when it is to be jailed and nothing can do that."""
        if jailed and self.jailer is None:
            pytest.skip("NOTHING WAS SHOWN IN THE JAILER: JAILER_BINARY is not set")
        return super().install(place, jailed=jailed)

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
