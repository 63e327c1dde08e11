"""Finding and deleting what is a tenant's, for the workflow that removes one.

It runs in the workers' process, and uses what the API uses: a build is deleted in one way only.
"""

from __future__ import annotations

import asyncio

import grpc
from temporalio import activity
from temporalio.client import Client

from activities.contract.errors import TenantRemovalError
from activities.contract.interface import TenantRemovalActivities
from activities.contract.search_attributes import BUILDS
from activities.contract.tenant_removal import DeleteBuildInput, FindBuildsInput, TenantBuilds
from activities.process.beating import beating
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.store.bucket import Bucket
from activities.store.layer_leftovers import collect_all_of
from activities.store.objects import places_of_tenant
from activities.store.owners import read_owner
from activities.store.stored import templates_of
from api.errors import ApiError
from api.server.access import Caller, Right, current_caller
from api.server.ending import BuildEnder
from api.server.finding import BuildFinder
from api.server.known_hosts import KnownHosts
from api.server.listing import MAX_PAGE, BuildListing
from api.server.template_bucket import TemplateBucket
from api.server.tenancy import condition_of
from api.server.waiting import WaitingLine

FOUND_AT_ONCE = 500
REMOVER = Caller("tenants delete", Right.OPERATOR)


class TenantRemover(TenantRemovalActivities):
    """Removes a tenant's builds and objects. See `interface` for the contract."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._bucket = Bucket(settings.bucket)
        reading = TemplateBucket(settings.bucket)
        self._finder = BuildFinder(client, reading)
        self._ender = BuildEnder(client, settings, self._finder)
        self._listing = BuildListing(
            client, WaitingLine(client, KnownHosts(client)), Sealer(settings.secret_keys)
        )

    @activity.defn(name="find_builds_of_tenant")
    async def find_builds_of_tenant(self, find: FindBuildsInput, /) -> TenantBuilds:
        """Look in Temporal and in the bucket, until some are found."""
        current_caller.set(REMOVER)
        known = set(find.without)
        found = await beating(self._in_temporal(find.tenant, known))
        if not found:
            found = await beating(asyncio.to_thread(self._in_bucket, find.tenant, known))
        return TenantBuilds(build_ids=tuple(sorted(found)[:FOUND_AT_ONCE]))

    @activity.defn(name="delete_build_of_tenant")
    async def delete_build_of_tenant(self, delete: DeleteBuildInput, /) -> None:
        """Delete a build as `TemplateBuildDelete` does; one that has gone is fine.

        Raises TenantRemovalError.
        """
        current_caller.set(REMOVER)
        owner = await asyncio.to_thread(read_owner, self._bucket, delete.build_id)
        if owner not in (None, delete.tenant):
            raise TenantRemovalError(f"build {delete.build_id} is another tenant's")
        try:
            await beating(self._ender.delete(delete.build_id))
        except ApiError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise TenantRemovalError(f"build {delete.build_id}: {error.message}") from error

    @activity.defn(name="delete_objects_of_tenant")
    async def delete_objects_of_tenant(self, tenant: str, /) -> int:
        """Delete the tenant's files, logs of builds that are not known any more, and layers.

        Returns how many files and logs these were.
        """
        return await beating(asyncio.to_thread(self._delete_objects, tenant))

    async def _in_temporal(self, tenant: str, known: set[str]) -> set[str]:
        found: set[str] = set()
        query, token = f"{BUILDS} AND {condition_of(tenant)}", ""
        while len(found) < FOUND_AT_ONCE:
            page = await self._listing.page(query, MAX_PAGE, token)
            found |= {build.build_id for build in page.builds} - known
            token = page.next_page_token
            if not token:
                break
        return found

    def _in_bucket(self, tenant: str, known: set[str]) -> set[str]:
        return templates_of(self._bucket, tenant) - known

    def _delete_objects(self, tenant: str) -> int:
        collect_all_of(self._bucket, tenant)
        return sum(
            self._bucket.delete_objects(self._bucket.list_objects(place))
            for place in places_of_tenant(tenant)
        )
