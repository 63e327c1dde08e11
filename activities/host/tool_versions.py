"""Known holes of the tools that a tenant's bytes reach, and whether this host's versions have them.

A version is right when its maker says so, or when it is a Debian package of the same version in
which Debian has mended the hole.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import docker
from packaging.specifiers import SpecifierSet

from activities.contract.errors import TemplateManagerError, UnsafeToolsError
from activities.disk.programs import child_environment
from activities.image.docker_daemon import docker_errors
from activities.microvm.resumable import vmm_version
from activities.process.settings import Settings

Tool = Literal["Docker", "runc", "containerd", "e2fsprogs", "Python", "Firecracker"]
# The daemon says what it runs, under these names.
COMPONENTS: Mapping[str, Tool] = {"Engine": "Docker", "containerd": "containerd", "runc": "runc"}
PACKAGES: Mapping[Tool, str] = {
    "Docker": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "e2fsprogs": "e2fsprogs",
    "Python": "python{}.{}".format(*platform.python_version_tuple()),
}
NUMBERS = re.compile(r"\d+(?:\.\d+)*")
TOOL_SECONDS = 10.0


@dataclass(frozen=True)
class Hole:
    """A hole of a tool. `affected` are ranges of its maker's versions, any of which has it."""

    tool: Tool
    cve: str
    what: str
    """What a tenant gains by it here."""
    affected: tuple[str, ...]
    debian: str = ""
    """The Debian revision that mends it in a version that is `affected`; '' when none does."""
    refused: bool = True
    """Whether a host with it does not start; else the doctor warns."""
    source: str = ""


HOLES: Sequence[Hole] = (
    Hole(
        tool="runc",
        cve="CVE-2024-21626",
        what="an image's working directory leads out of its container",
        affected=("<1.1.12",),
        debian="1.1.5+ds1-1+deb12u1",
        source="runc 1.1.12, GHSA-xr7r-f8xq-vfvv; Debian's changelog of the revision",
    ),
    Hole(
        tool="runc",
        cve="CVE-2025-31133",
        what="a tenant's command in a container can have files of procfs written to (with "
        "CVE-2025-52565 and CVE-2025-52881); Debian 12 has no fix",
        affected=("<1.2.8", ">=1.3.0,<1.3.3"),
        refused=False,
        source="runc 1.2.8 and 1.3.3, GHSA-9493-h29p-rfm2 and the two beside it",
    ),
    Hole(
        tool="containerd",
        cve="CVE-2024-40635",
        what="an image's user id over 2^31 runs as root",
        affected=("<1.6.38", ">=1.7.0,<1.7.27", ">=2.0.0,<2.0.4"),
        debian="1.6.20~ds1-1+deb12u2",
        source="GHSA-265r-hfxg-fhmg; Debian's changelog of the revision",
    ),
    Hole(
        tool="containerd",
        cve="CVE-2024-25621",
        what="other users of the host read containerd's directories",
        affected=("<1.7.29", ">=2.0.0,<2.0.7", ">=2.1.0,<2.1.5"),
        debian="1.6.20~ds1-1+deb12u2",
        source="GHSA-pwhc-rpq9-4c8w; Debian's changelog of the revision",
    ),
    Hole(
        tool="Docker",
        cve="CVE-2024-41110",
        what="calls get past a plugin that limits who may do what with dockerd",
        affected=("<26.1.5", ">=27.0,<27.1.1"),
        debian="20.10.24+dfsg1-1+deb12u1",
        source="GHSA-v23v-6jw2-98fq; Debian's changelog of the revision",
    ),
    Hole(
        tool="e2fsprogs",
        cve="CVE-2022-1304",
        what="a guest's damaged disk writes into e2fsck's memory",
        affected=("<1.46.6",),
        source="NVD; Debian's changelog of 1.46.6~rc1-1",
    ),
    Hole(
        tool="Python",
        cve="CVE-2025-8194",
        what="a tar with a negative size keeps a step busy for ever",
        affected=("<3.11.14", ">=3.12.0,<3.12.12", ">=3.13.0,<3.13.6"),
        debian="3.11.2-6+deb12u7",
        refused=False,
        source="the CVE's own record; Debian's changelog of the revision",
    ),
    Hole(
        tool="Firecracker",
        cve="CVE-2026-5747",
        what="a guest writes out of bounds by virtio's PCI transport, which is not turned on here",
        affected=(">=1.13.0,<1.14.4", "==1.15.0"),
        refused=False,
        source="AWS bulletin 2026-015, GHSA-776c-mpj7-jm3r",
    ),
    Hole(
        tool="Firecracker",
        cve="CVE-2026-1386",
        what="the jailer follows links of whoever may write to its directories, which is root here",
        affected=("<=1.13.1", "==1.14.0"),
        refused=False,
        source="the CVE's own record: mended in 1.13.2 and 1.14.1",
    ),
    Hole(
        tool="Firecracker",
        cve="CVE-2026-122192",
        what="a guest reaches the VMM's memory after a discard of memory has failed; guests here "
        "have no balloon",
        affected=(">=0.23.0,<1.16.2",),
        refused=False,
        source="the CVE's own record",
    ),
)


@dataclass(frozen=True)
class Installed:
    """A tool as it is here. `debian` is the whole version of the package that it is of, or ''."""

    tool: Tool
    version: str
    debian: str = ""


def has(installed: Installed, hole: Hole) -> bool:
    """Whether this version has the hole. One that says no version has it: nobody can tell."""
    found = NUMBERS.match(installed.version.removeprefix("v"))
    if found is not None and not any(found[0] in SpecifierSet(each) for each in hole.affected):
        return False
    return not _is_mended_by_debian(installed.debian, hole.debian)


def _is_mended_by_debian(installed: str, mended: str) -> bool:
    """Whether a package is the one in which Debian has mended it, or a later one of that version.

    Of another version: what Debian has done to that one does not say anything about it.
    """
    if not installed or not mended or _version_of(installed) != _version_of(mended):
        return False
    command = ["dpkg", "--compare-versions", installed, "ge", mended]
    return subprocess.run(command, check=False, env=child_environment()).returncode == 0


def _version_of(package: str) -> str:
    """Return the maker's version of a package's: without Debian's epoch and revision."""
    return package.rpartition(":")[2].rpartition("-")[0]


def installed_tools(settings: Settings, docker_client: docker.APIClient) -> list[Installed]:
    """Return the versions of this host's tools. Blocking.

    Raises DockerUnavailableError. A tool that is not there is left out: the doctor says so.
    """
    with docker_errors():
        components = docker_client.version().get("Components") or []
    found: dict[Tool, str] = {
        COMPONENTS[each["Name"]]: each["Version"]
        for each in components
        if each["Name"] in COMPONENTS
    }
    found["Python"] = platform.python_version()
    found |= _told("e2fsprogs", lambda: _said("e2fsck", "-V").split()[1])
    firecracker = settings.firecracker_path(settings.default_firecracker_version)
    found |= _told("Firecracker", lambda: vmm_version(firecracker))
    return [Installed(tool, version, _package(tool, version)) for tool, version in found.items()]


def holes_of(tools: Sequence[Installed]) -> list[tuple[Installed, Hole]]:
    """Return which of these tools have which holes."""
    return [
        (tool, hole)
        for tool in tools
        for hole in HOLES
        if hole.tool == tool.tool and has(tool, hole)
    ]


def refusals(settings: Settings, found: Sequence[tuple[Installed, Hole]]) -> list[str]:
    """Return what keeps a host from starting, in words."""
    return [
        f"{tool.tool} {tool.debian or tool.version} has {hole.cve}: {hole.what}"
        for tool, hole in found
        if hole.refused and hole.cve not in settings.accepted_cves
    ]


def require_safe_tools(settings: Settings, docker_client: docker.APIClient) -> None:
    """Raise UnsafeToolsError when a tool has a hole that nobody has accepted. Blocking."""
    refused = refusals(settings, holes_of(installed_tools(settings, docker_client)))
    if refused:
        raise UnsafeToolsError("; ".join(refused))


def _told(tool: Tool, ask: Callable[[], str]) -> dict[Tool, str]:
    try:
        return {tool: ask()}
    except (TemplateManagerError, OSError, subprocess.SubprocessError, IndexError):
        return {}


def _said(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=TOOL_SECONDS,
        env=child_environment(),
    )
    return done.stdout + done.stderr


def _package(tool: Tool, version: str) -> str:
    """Return the Debian package that a tool is of, by its version: '' when it is of none."""
    if tool not in PACKAGES:
        return ""
    command = ("dpkg-query", "-W", "-f", "${Version}", PACKAGES[tool])
    found = _told(tool, lambda: _said(*command))
    package = found.get(tool, "")
    return package if _version_of(package) == version else ""
