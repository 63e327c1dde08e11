"""Which host has most of what a new build begins with: the one that built the like of it last.

A hint, found by what Temporal keeps of builds: the workflow asks that host first, which takes the
build only if it has a free slot. Nobody is passed by: where builds wait for a host, there is no
hint, and a host with a free slot has asked for them first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import structlog
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError

from activities.contract.names import SHARED_HOST_TASK_QUEUE, HostName, lease_task_queue
from activities.contract.requests import TemplateConfig
from activities.contract.search_attributes import (
    BUILD_ID,
    BUILDS,
    IMAGE,
    KVM_HOST,
    TEMPLATE_ID,
    TENANT,
)
from activities.contract.sources import FromTemplate
from api.server.known_hosts import KnownHosts

RPC_LIMIT = timedelta(seconds=2)
"""A request waits for it."""
LATEST = 20
"""Builds that are looked at, the latest first."""
MOST_ASKED = 3
"""Hosts of which it is looked whether they run."""
ACTIVITY = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY

_log = structlog.get_logger(__name__)


class WarmHosts:
    """Finds the host that a new build is to ask first."""

    def __init__(self, client: Client, hosts: KnownHosts) -> None:
        self._client = client
        self._hosts = hosts

    async def find(self, config: TemplateConfig) -> HostName | None:
        """Return the host that has most of a build's layers, as far as can be told.

        None when it is not known, does not run, or when builds wait for a host.
        """
        if config.force:
            return None
        try:
            waiting, builds = await asyncio.gather(
                self._hosts.waiting(SHARED_HOST_TASK_QUEUE, ACTIVITY), self._like(config)
            )
        except RPCError as error:
            _log.warning("warm hosts cannot be looked for", error=str(error))
            return None
        if waiting:
            return None
        for host in warm_hosts(config, builds)[:MOST_ASKED]:
            if await self._hosts.is_polled(lease_task_queue(host), ACTIVITY):
                return host
        return None

    async def _like(self, config: TemplateConfig) -> Sequence[WorkflowExecution]:
        """Return the tenant's latest builds that have something in common with this one."""
        found = self._client.list_workflows(
            query_of(config), page_size=LATEST, rpc_timeout=RPC_LIMIT
        )
        await found.fetch_next_page()
        return found.current_page or ()


def query_of(config: TemplateConfig) -> str:
    """Return the query for builds of the same template, of the same base, and of the base."""
    alike = [f"{TEMPLATE_ID.name}='{config.template_id}'"]
    image = config.source.described
    if "'" not in image:
        alike.append(f"{IMAGE.name}='{image}'")
    if isinstance(config.source, FromTemplate):
        alike.append(f"{BUILD_ID.name}='{config.source.build_id}'")
    return f"{BUILDS} AND {TENANT.name}='{config.tenant}' AND ({' OR '.join(alike)})"


def warm_hosts(config: TemplateConfig, builds: Sequence[WorkflowExecution]) -> list[HostName]:
    """Return the hosts of builds, the latest first, the best first.

    Who has built the same template has its steps, too; who has built the base, or on it, that.
    """

    def is_other_template(build: WorkflowExecution) -> bool:
        return build.typed_search_attributes.get(TEMPLATE_ID) != config.template_id

    ranked = sorted(builds, key=is_other_template)  # stays in order of time otherwise
    hosts = [build.typed_search_attributes.get(KVM_HOST) for build in ranked]
    return list(dict.fromkeys(host for host in hosts if host))
