"""Removing a template for good. Doing it twice is fine."""

from __future__ import annotations

import asyncio

from temporalio import activity

from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.inputs import DeleteTemplateInput
from activities.contract.interface import DeletionActivities
from activities.contract.names import tenant_mark
from activities.contract.results import DeletedTemplate
from activities.image.registry import RegistryAccess, delete_tag
from activities.image.registry_login import GOOGLE_DELETES, HostLogins, credentials_for
from activities.process.beating import beating
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.store.bucket import Bucket
from activities.store.layers import LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.names import TenantNames
from activities.store.objects import (
    archived_log_name,
    is_used_layer,
    lease_name,
    template_prefix,
)
from activities.template.artifacts import remove_listed, remove_objects


class BucketDeletionActivities(DeletionActivities):
    """Deletes objects and image tags. See `interface` for the contract."""

    def __init__(self, bucket: Bucket, sealer: Sealer, settings: Settings) -> None:
        """`settings` say how to speak to registries, and what they get of this machine's."""
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
        return await beating(asyncio.to_thread(self._delete_objects, delete))

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

    def _delete_objects(self, delete: DeleteTemplateInput) -> DeletedTemplate:
        tombstone = self._leases.bury(delete.build_id)
        prefixes = _prefixes(delete.build_id, delete.tenant)
        removed = sum(remove_objects(self._bucket, prefix) for prefix in prefixes)
        self._layers.release(delete.build_id, collect=True)
        # After its metadata: whoever gives it a tag looks for those once more.
        names = TenantNames(self._bucket, delete.tenant)
        return DeletedTemplate(
            removed_objects=removed,
            tombstone_generation=tombstone,
            tenant=delete.tenant,
            names=tuple(names.remove_build(delete.build_id, None)),
        )

    def _remove_late_arrivals(self, build_id: str, deleted: DeletedTemplate) -> int:
        prefixes = _prefixes(build_id, deleted.tenant)
        late = {prefix: self._bucket.list_objects(prefix) for prefix in prefixes}
        uses = [o for listed in late.values() for o in listed if is_used_layer(o.name)]
        # Looked at after the listing: while the tombstone stands, nothing listed is of a new build.
        current = self._bucket.stat_object(lease_name(build_id))
        if current is None or current.generation != deleted.tombstone_generation:
            return 0
        self._layers.release_listed(build_id, uses, collect=True)
        removed = sum(remove_listed(self._bucket, prefix, late[prefix]) for prefix in late)
        self._leases.unbury(build_id, current.generation)
        return removed


def _prefixes(build_id: str, tenant: str) -> tuple[str, str]:
    return template_prefix(build_id), archived_log_name(build_id, tenant)
