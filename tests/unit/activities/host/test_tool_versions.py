"""Which versions of a host's tools are refused; what Debian has mended in an old version is not."""

from __future__ import annotations

import shutil
from typing import cast
from unittest.mock import create_autospec

import docker
import pytest
from packaging.specifiers import SpecifierSet

from activities.contract.errors import UnsafeToolsError
from activities.host.tool_versions import (
    HOLES,
    Hole,
    Installed,
    Tool,
    has,
    holes_of,
    refusals,
    require_safe_tools,
)
from activities.process.settings import Settings

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg") is None, reason="no dpkg: not a Debian")


def hole(cve: str) -> Hole:
    [found] = [each for each in HOLES if each.cve == cve]
    return found


@needs_dpkg
@pytest.mark.parametrize(
    ("cve", "version", "debian", "is_there"),
    [
        ("CVE-2024-21626", "1.1.5+ds1", "1.1.5+ds1-1", True),
        ("CVE-2024-21626", "1.1.5+ds1", "1.1.5+ds1-1+b4", True),
        ("CVE-2024-21626", "1.1.5+ds1", "1.1.5+ds1-1+deb12u1", False),
        ("CVE-2024-21626", "1.1.11", "", True),
        ("CVE-2024-21626", "1.1.12", "", False),
        ("CVE-2024-21626", "v1.2.0-rc.1", "", False),
        ("CVE-2024-21626", "unknown", "", True),
        # Of another version than the one that Debian has mended: its number alone counts.
        ("CVE-2024-21626", "1.1.10", "1.1.10-1", True),
        ("CVE-2024-40635", "1.6.20~ds1", "1.6.20~ds1-1+deb12u1", True),
        ("CVE-2024-40635", "1.6.20~ds1", "1.6.20~ds1-1+deb12u2", False),
        ("CVE-2024-40635", "1.6.20~ds1", "1.6.20~ds1-1+deb12u3", False),
        ("CVE-2024-40635", "1.7.24~ds1", "1.7.24~ds1-6", True),
        ("CVE-2024-40635", "1.7.27", "", False),
        ("CVE-2024-41110", "20.10.24+dfsg1", "20.10.24+dfsg1-1", True),
        ("CVE-2024-41110", "20.10.24+dfsg1", "20.10.24+dfsg1-1+deb12u1+b6", False),
        ("CVE-2024-41110", "27.1.1", "", False),
        ("CVE-2024-41110", "27.0.3", "", True),
        ("CVE-2022-1304", "1.46.2", "1.46.2-2", True),
        ("CVE-2022-1304", "1.47.0", "1.47.0-2", False),
        ("CVE-2025-8194", "3.11.2", "3.11.2-6+deb12u6", True),
        ("CVE-2025-8194", "3.11.2", "3.11.2-6+deb12u7", False),
        ("CVE-2025-8194", "3.13.6", "", False),
        ("CVE-2026-5747", "1.14.4", "", False),
        ("CVE-2026-5747", "1.15.0", "", True),
    ],
)
def test_a_version_and_its_package(cve: str, version: str, debian: str, is_there: bool) -> None:
    found = hole(cve)
    assert has(Installed(found.tool, version, debian), found) is is_there


@pytest.mark.parametrize("each", HOLES, ids=lambda each: each.cve)
def test_each_hole_says_what_it_is_and_where_that_is_known_from(each: Hole) -> None:
    assert each.what
    assert each.source
    assert each.cve.startswith("CVE-")
    assert all(SpecifierSet(versions) for versions in each.affected)


def answering(runc: str) -> docker.APIClient:
    client = create_autospec(docker.APIClient)
    components = {"Engine": "29.6.0", "containerd": "v2.2.5", "runc": runc, "docker-init": "0.19.0"}
    client.version.return_value = {
        "Components": [{"Name": name, "Version": told} for name, told in components.items()]
    }
    return cast("docker.APIClient", client)  # why: a mock has no type


def test_a_host_with_a_hole_does_not_start() -> None:
    with pytest.raises(UnsafeToolsError) as refused:
        require_safe_tools(Settings(), answering("1.1.11"))
    assert "runc 1.1.11 has CVE-2024-21626" in refused.value.message
    assert "TEMPLATE_MANAGER_ACCEPTED_CVES" in refused.value.hint
    require_safe_tools(Settings(), answering("1.3.3"))


def test_an_operator_may_accept_a_hole_by_its_name() -> None:
    accepting = Settings(accepted_cves=("CVE-2024-21626",))
    require_safe_tools(accepting, answering("1.1.11"))
    with pytest.raises(UnsafeToolsError):
        require_safe_tools(Settings(accepted_cves=("CVE-2019-5736",)), answering("1.1.11"))


def test_what_is_no_way_out_is_told_and_not_refused() -> None:
    tools: list[tuple[Tool, str]] = [("Python", "3.11.2"), ("Firecracker", "1.13.1")]
    found = holes_of([Installed(tool, version) for tool, version in tools])
    assert {each.cve for _, each in found} >= {"CVE-2025-8194", "CVE-2026-1386"}
    assert refusals(Settings(), found) == []
