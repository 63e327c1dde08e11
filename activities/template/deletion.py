"""Removing a template for good. Doing it twice is fine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from temporalio import activity

from activities.contract.errors import LeaseLostError
from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.inputs import DeleteTemplateInput
from activities.contract.interface import DeletionActivities
from activities.contract.names import tenant_mark
from activities.contract.results import DeletedTemplate, StoredObject
from activities.image.registry import RegistryAccess, delete_tag
from activities.image.registry_login import GOOGLE_DELETES, HostLogins, credentials_for
from activities.process.attempts import IsAwaited, this_attempt
from activities.process.beating import beating
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.store.bucket import Bucket
from activities.store.layers import LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.names import TenantNames
from activities.store.objects import archived_log_name, is_used_layer, template_prefix
from activities.template.artifacts import remove_listed

There = Mapping[str, Sequence[StoredObject]]
"""What is there of a build, by what its names begin with."""


class BucketDeletionActivities(DeletionActivities):
    """Deletes objects and image tags. See `interface` for the contract."""

    def __init__(
        self,
        bucket: Bucket,
        sealer: Sealer,
        settings: Settings,
        attempt: Callable[[], IsAwaited] = this_attempt,
    ) -> None:
        """`settings` say how to speak to registries, and what they get of this machine's.

        `attempt` is asked in an activity what tells whether that attempt is still waited for.
        """
        self._attempt = attempt
        self._bucket = bucket
        self._sealer = sealer
        self._access = RegistryAccess.of(settings)
        self._host_logins = HostLogins(settings.lends_host_login_to, GOOGLE_DELETES)
        self._leases = LeaseObjects(bucket)
        self._layers = LayerObjects(bucket)

    @activity.defn(name="delete_objects")
    async def delete_objects(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        """Leave a tombstone, then remove all objects, `metadata.json` first, and then those layers
        that nobody else needs."""
        is_awaited, loop = self._attempt(), asyncio.get_running_loop()

        def require_awaited() -> None:
            if not asyncio.run_coroutine_threadsafe(is_awaited(), loop).result():
                raise LeaseLostError(f"another attempt deletes build {delete.build_id}")

        return await beating(asyncio.to_thread(self._delete_objects, delete, require_awaited))

    @activity.defn(name="delete_image_tag")
    async def delete_image_tag(self, delete: DeleteTemplateInput, /) -> DeletedTemplate:
        """Remove the service's own tag from the registry."""
        kept = await asyncio.to_thread(self._delete_tag, delete)
        return DeletedTemplate(removed_tag=not kept, kept_tag_reason=kept)

    @activity.defn(name="remove_late_arrivals")
    async def remove_late_arrivals(self, deleted: DeletedTemplate, build_id: str, /) -> int:
        """Remove what came in after the delete, then the tombstone; leave a new build alone."""
        return await asyncio.to_thread(self._remove_late_arrivals, build_id, deleted)

    def _delete_tag(self, delete: DeleteTemplateInput) -> str:
        assert delete.own_image is not None
        try:
            reference = ImageReference.parse(delete.own_image)
        except ImageReferenceError:
            return ""  # no registry can have it
        only_for = SealedFor(delete.build_id, reference.registry, tenant_mark(delete.tenant))
        credentials = credentials_for(
            reference,
            delete.registry_auth,
            lambda sealed: self._sealer.open(sealed, only_for),
            self._host_logins,
        )
        return delete_tag(reference, credentials, self._access)

    def _delete_objects(
        self, delete: DeleteTemplateInput, require_awaited: Callable[[], None]
    ) -> DeletedTemplate:
        # An attempt that was held up may find a new build here, for which a later one made room:
        # running, or ended and without a lease. None begins while this attempt is waited for, so
        # what was seen before it still was is none of a new build's.
        tombstone = self._leases.bury(delete.build_id, require_awaited)
        there = self._there(delete.build_id, delete.tenant)
        require_awaited()
        require_buried = partial(self._leases.require_current, delete.build_id, tombstone)
        require_buried()
        removed = self._remove(delete.build_id, there)
        # After its metadata: whoever gives it a tag looks for those once more.
        names = TenantNames(self._bucket, delete.tenant)
        return DeletedTemplate(
            removed_objects=removed,
            tombstone_generation=tombstone,
            tenant=delete.tenant,
            names=tuple(names.remove_build(delete.build_id, None, require_buried)),
        )

    def _remove_late_arrivals(self, build_id: str, deleted: DeletedTemplate) -> int:
        tombstone, late = deleted.tombstone_generation, self._there(build_id, deleted.tenant)
        if tombstone is None or not self._leases.is_current(build_id, tombstone):
            return 0
        removed = self._remove(build_id, late)
        self._leases.unbury(build_id, tombstone)
        return removed

    def _there(self, build_id: str, tenant: str) -> There:
        """List a build's objects. While the tombstone still stands then, none is of a new build."""
        prefixes = template_prefix(build_id), archived_log_name(build_id, tenant)
        return {prefix: self._bucket.list_objects(prefix) for prefix in prefixes}

    def _remove(self, build_id: str, there: There) -> int:
        """Remove exactly these objects, and those layers that nobody else needs."""
        uses = [each for listed in there.values() for each in listed if is_used_layer(each.name)]
        others = {prefix: [o for o in there[prefix] if o not in uses] for prefix in there}
        removed = sum(remove_listed(self._bucket, *each) for each in others.items())
        self._layers.release(build_id, uses, collect=True)
        return removed
