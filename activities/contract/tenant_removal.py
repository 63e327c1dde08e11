"""Removing all that is a tenant's."""

from __future__ import annotations

from pydantic import Field

from activities.contract.model import Model
from activities.contract.names import BuildId, TenantName


class TenantBuilds(Model):
    """What `find_builds_of_tenant` has found."""

    build_ids: tuple[BuildId, ...] = ()
    """Some of those that are there; asked again when these are gone."""


class FindBuildsInput(Model):
    """Input of `find_builds_of_tenant`."""

    tenant: TenantName
    without: tuple[BuildId, ...] = ()
    """Those that could not be deleted."""


class DeleteBuildInput(Model):
    """Input of `delete_build_of_tenant`."""

    tenant: TenantName
    build_id: BuildId


class TenantRemoval(Model):
    """What has been removed of a tenant. The `DeleteTenant` workflow carries it on."""

    tenant: TenantName
    builds: int = 0
    """With their templates, logs and images of ours."""
    objects: int = 0
    """Besides: files of COPY steps, and logs that no build was found for."""
    left: tuple[BuildId, ...] = ()
    """Builds that could not be deleted; the activities that failed say why."""
    tries: dict[BuildId, int] = Field(default_factory=dict, exclude_if=lambda tries: not tries)
    """How often each of those found last was deleted, where a run goes on from another."""
