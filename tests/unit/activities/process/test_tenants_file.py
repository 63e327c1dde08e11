from __future__ import annotations

import os
from pathlib import Path

import pytest

from activities.process.tenants_file import (
    TenantLimits,
    TenantsFile,
    TenantsFileError,
    parse_tenants,
)

TEXT = """
[default]
running_builds = 10
stored_mb = 1000

[tenants.acme]
running_builds = 40
calls_per_second = 2.5
stored_mb = "unlimited"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(TEXT)
    return path


def test_a_tenant_has_the_default_but_for_what_it_has_of_its_own(path: Path) -> None:
    tenants = TenantsFile(path)
    assert tenants.limits_of("beta") == TenantLimits(running_builds=10, stored_mb=1000)
    acme = tenants.limits_of("acme")
    assert acme == TenantLimits(running_builds=40, calls_per_second=2.5)
    assert acme.burst == 10
    assert tenants.named() == ("acme",)


def test_without_a_file_nothing_is_limited() -> None:
    assert TenantsFile(None).limits_of("acme") == TenantLimits()
    assert TenantsFile(None).named() == ()


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(path: Path) -> None:
    tenants = TenantsFile(path)
    path.write_text("[default]\nrunning_builds = 1\n")
    os.utime(path, (1, 1))
    assert tenants.limits_of("acme") == TenantLimits(running_builds=1)
    path.write_text("[default]\nrunning = 1\n")
    assert tenants.limits_of("acme") == TenantLimits(running_builds=1)
    path.unlink()
    assert tenants.limits_of("acme") == TenantLimits(running_builds=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[default", "table declaration"),
        ("running_builds = 1", "no more"),
        ("default = 1", "no more"),
        ("[tenants]\nacme = 1", "tenants.acme"),
        ("[tenants.ACME]", "'ACME'"),
        ("[default]\nrunning = 1", "no limit running"),
        ("[tenants.acme]\nrunning = 1", "no limit running"),
        ("[default]\nrunning_builds = -1", "running_builds"),
        ("[default]\nrunning_builds = 1.5", "running_builds"),
        ("[default]\nrunning_builds = true", "running_builds"),
        ('[default]\nrunning_builds = "many"', "running_builds"),
        ("[default]\ncalls_per_second = 0", "calls_per_second"),
        ("[tenants.acme]\nbuild_seconds = 0", "build_seconds"),
    ],
)
def test_what_is_not_understood_is_refused_and_named(text: str, told: str) -> None:
    with pytest.raises(TenantsFileError, match=told):
        parse_tenants(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TenantsFileError, match=r"nothing\.toml"):
        TenantsFile(tmp_path / "nothing.toml")
