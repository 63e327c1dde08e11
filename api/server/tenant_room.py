"""Whether a tenant may have one more build: its limits against what it uses now.

What is above the limit of running builds is not refused: it waits in the tenant's own line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import grpc
from temporalio.client import Client

from activities.contract.line import MAX_IN_LINE, LinedBuild, TenantTerms
from activities.contract.network_policy import (
    INTERNET,
    NO_NETWORK,
    NetworkPolicy,
)
from activities.contract.requests import TemplateConfig
from activities.contract.units import MIB
from activities.process.tenants_file import TenantLimits, TenantsFile
from api.errors import ApiError, tenant_limit
from api.server.finding import RPC_LIMIT
from api.server.template_bucket import TemplateBucket
from api.server.tenancy import condition_of
from api.server.tenant_use import line_of, still_running
from api.server.waiting import WAITING_BUILDS

RETRY_SECONDS = 10.0
# What is deleted counts until the bucket is swept.
SWEEP_RETRY_SECONDS = 60.0


class TenantRoom:
    """The room that tenants have left. It keeps nothing: Temporal and the bucket are asked."""

    def __init__(self, client: Client, bucket: TemplateBucket, tenants: TenantsFile) -> None:
        self._client = client
        self._bucket = bucket
        self._tenants = tenants

    def weight_of(self, tenant: str) -> float:
        """Return how often a tenant gets a host, against others that wait."""
        return self._tenants.limits_of(tenant).fairness_weight

    def network_of(
        self, config: TemplateConfig, default: Literal["internet", "none"]
    ) -> NetworkPolicy:
        """Return what a build's guests may reach: what it asks for, or as much of the default as
        its tenant may.

        Raises ApiError PERMISSION_DENIED when it asks for more than that.
        """
        may_reach_out = self._tenants.limits_of(config.tenant).network != "none"
        asked = config.network
        if asked is None:
            leads_out = may_reach_out and default != "none"
            return INTERNET if leads_out else NO_NETWORK
        if asked.leads_out and not may_reach_out:
            raise _no_network(config.tenant, asked)
        return asked

    async def require(self, config: TemplateConfig) -> TenantTerms:
        """Return what the limits of a build's tenant mean for it.

        Raises ApiError RESOURCE_EXHAUSTED when there is no room for it: without a time to retry
        when there never will be. Temporal's count lags a little, so that a burst may get somewhat
        further (and waits, so that no more vCPUs and memory are in use than may be); what is stored
        is as the last sweep of the bucket has counted it.
        """
        limits = self._tenants.limits_of(config.tenant)
        _require_size(config, limits)
        await self._require_line(config.tenant, limits)
        await self._require_machines(config, limits)
        await self._require_store(config.tenant, limits)
        return terms_of(limits)

    async def _require_line(self, tenant: str, limits: TenantLimits) -> None:
        most = most_waiting(limits)
        if most is None:
            return
        waiting = await self._client.count_workflows(
            f"{WAITING_BUILDS} AND {condition_of(tenant)}", rpc_timeout=RPC_LIMIT
        )
        if waiting.count >= most:
            raise tenant_limit(
                tenant,
                "waiting_builds",
                most,
                waiting.count,
                retry_after_seconds=RETRY_SECONDS,
            )

    async def _require_machines(self, config: TemplateConfig, limits: TenantLimits) -> None:
        if limits.vcpus is None and limits.memory_mb is None:
            return
        line = await line_of(self._client, config.tenant)
        running: Sequence[LinedBuild] = line.running if line else ()
        if _above_use(config, limits, running):
            running = await still_running(self._client, config.tenant, running)
        if refused := _above_use(config, limits, running):
            raise refused

    async def _require_store(self, tenant: str, limits: TenantLimits) -> None:
        if limits.stored_mb is None:
            return
        stored = await self._bucket.stored()
        used_mb = stored.of(tenant).bytes // MIB if stored else 0
        if used_mb >= limits.stored_mb:
            raise tenant_limit(
                tenant,
                "stored_mb",
                limits.stored_mb,
                used_mb,
                retry_after_seconds=SWEEP_RETRY_SECONDS,
            )


def _no_network(tenant: str, asked: NetworkPolicy) -> ApiError:
    return ApiError(
        grpc.StatusCode.PERMISSION_DENIED,
        "NETWORK_NOT_ALLOWED",
        f"network of tenant {tenant}: {asked.access}, of none that is allowed",
        hint="Ask for none (CLI: --network none); an operator sets the limits.",
        metadata={"limit": "network", "allowed": "none", "used": asked.access},
    )


def terms_of(limits: TenantLimits) -> TenantTerms:
    """Return what is written into a build."""
    return TenantTerms(
        takes_turns=limits.running.limit_anything,
        build_seconds=limits.build_seconds,
        template_mb=limits.template_mb,
    )


def most_waiting(limits: TenantLimits) -> int | None:
    """Return how many builds may wait; a line itself takes only so many."""
    if not limits.running.limit_anything:
        return limits.waiting_builds
    return MAX_IN_LINE if limits.waiting_builds is None else min(limits.waiting_builds, MAX_IN_LINE)


def _above_use(
    config: TemplateConfig, limits: TenantLimits, running: Sequence[LinedBuild]
) -> ApiError | None:
    """Return what refuses a build for which the running ones leave no room."""
    vcpus = sum(build.vcpu_count for build in running)
    memory_mb = sum(build.memory_mb for build in running)
    for limit, most, used, asked in (
        ("vcpus", limits.vcpus, vcpus, config.vcpu_count),
        ("memory_mb", limits.memory_mb, memory_mb, config.memory_mb),
    ):
        if most is not None and used + asked > most:
            return tenant_limit(
                config.tenant,
                limit,
                most,
                used,
                asked=asked,
                retry_after_seconds=RETRY_SECONDS,
            )
    return None


def _require_size(config: TemplateConfig, limits: TenantLimits) -> None:
    """Refuse what no end of another build would ever make room for."""
    template_mb = config.memory_mb + config.disk_size_mb
    for limit, most, asked in (
        ("vcpus", limits.vcpus, config.vcpu_count),
        ("memory_mb", limits.memory_mb, config.memory_mb),
        ("template_mb", limits.template_mb, template_mb),
    ):
        if most is not None and asked > most:
            raise tenant_limit(config.tenant, limit, most, asked, retry_after_seconds=None)
