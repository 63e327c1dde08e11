"""What each tenant may use: the tenants' file (TOML), the same for the API and the workers.

    [default]                 # for all that a tenant's own table does not say
    running_builds = 10

    [tenants.acme]
    running_builds = 40
    stored_mb = "unlimited"   # although there is a default

A change of the file counts at once; one that cannot be read keeps the last that could.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from activities.contract.line import RunningLimits
from activities.contract.names import TENANT_NAME
from activities.process.watched_file import WatchedFile

UNLIMITED = "unlimited"
# As many calls at once, of what is allowed in a second.
BURST_SECONDS = 4

Count = Annotated[int, Field(strict=True, ge=0)]


class TenantsFileError(ValueError):
    """A tenants' file that makes no sense; the message says where."""


class TenantLimits(BaseModel):
    """The limits of one tenant; None is no limit. `_mb` is MiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fairness_weight: Annotated[float, Field(ge=0.001, le=1000)] = 1
    """How many hosts it gets for each that a tenant of weight 1 gets, while both wait for some."""
    running_builds: Count | None = None
    """That hold a host, or wait in the line of all tenants for one; the others wait before it."""
    vcpus: Count | None = None
    """Of the running builds' VMs together."""
    memory_mb: Count | None = None
    """Of the running builds' VMs together."""
    waiting_builds: Count | None = None
    """That no host has taken; a create or retry above it is refused."""
    build_seconds: Annotated[float, Field(gt=0)] | None = None
    """How long one build may take, from the moment when a host takes it."""
    template_mb: Count | None = None
    """Disk and memory of one template."""
    network: Literal["internet", "none"] = "internet"
    """What its guests may reach; a create or retry that asks for more is refused."""
    stored_mb: Count | None = None
    """Of all its templates in the bucket; a create or retry above it is refused."""
    calls_per_second: Annotated[float, Field(gt=0)] | None = None
    """At each API process."""
    calls_burst: Annotated[int, Field(strict=True, ge=1)] | None = None
    """How many of them at once; by default those of four seconds."""

    @property
    def numbers(self) -> dict[str, float | None]:
        """What is a number, by name; None is no limit."""
        values: dict[str, float | str | None] = self.model_dump()
        return {name: value for name, value in values.items() if not isinstance(value, str)}

    @property
    def running(self) -> RunningLimits:
        """What decides which builds run and which wait."""
        return RunningLimits(builds=self.running_builds, vcpus=self.vcpus, memory_mb=self.memory_mb)

    @property
    def burst(self) -> int:
        """How many calls at once."""
        return self.calls_burst or max(1, round((self.calls_per_second or 0) * BURST_SECONDS))


class TenantsFile:
    """The limits of all tenants. Without a file there are none."""

    def __init__(self, path: Path | None) -> None:
        """Raises TenantsFileError when the file cannot be read now."""
        try:
            self._file = WatchedFile(path, parse_tenants) if path else None
        except (OSError, TenantsFileError) as error:
            raise TenantsFileError(f"tenants' file {path}: {error}") from None

    def limits_of(self, tenant: str) -> TenantLimits:
        """Return what a tenant may use now."""
        limits = self._file.current() if self._file else {}
        return limits.get(tenant) or limits.get("") or TenantLimits()

    def named(self) -> tuple[str, ...]:
        """Return the tenants that the file names."""
        return tuple(sorted(filter(None, self._file.current() if self._file else {})))


def parse_tenants(text: str) -> Mapping[str, TenantLimits]:
    """Read a tenants' file: limits by tenant; those of '' are everybody else's.

    Raises TenantsFileError.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TenantsFileError(str(error)) from None
    default, tenants = tables.pop("default", {}), tables.pop("tenants", {})
    # What is not understood is refused: a mistyped limit must not become none.
    if tables or not isinstance(default, dict) or not isinstance(tenants, dict):
        raise TenantsFileError("a tenants' file has [default] and [tenants.<name>], and no more")
    return {"": _limits("default", default, {})} | {
        name: _limits(f"tenants.{name}", own, default) for name, own in tenants.items()
    }


def _limits(where: str, own: object, default: Mapping[str, object]) -> TenantLimits:
    name = where.removeprefix("tenants.")
    if not TENANT_NAME.fullmatch(name):
        raise TenantsFileError(f"a tenant is 1 to 63 of a-z, 0-9 and -, not {name!r}")
    if not isinstance(own, dict):
        raise TenantsFileError(f"[{where}] is a table")
    given = {key: value for key, value in {**default, **own}.items() if value != UNLIMITED}
    if unknown := set(own) - set(TenantLimits.model_fields):
        raise TenantsFileError(f"[{where}]: there is no limit {', '.join(sorted(unknown))}")
    try:
        return TenantLimits.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise TenantsFileError(f"[{where}] {first['loc'][0]}: {first['msg']}") from None
