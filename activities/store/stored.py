"""How much each tenant has stored: counted by the bucket's sweep, kept for who decides by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from pydantic import ValidationError

from activities.contract.model import Model
from activities.contract.names import DEFAULT_TENANT
from activities.contract.results import StoredObject
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.objects import (
    ObjectKind,
    ObjectName,
    is_metadata,
    parse_object_name,
    stored_name,
)

TENANT_METADATA = "tenant"
"""In the custom metadata of a template's objects; without it they are the default tenant's."""


class TenantStored(Model):
    """What a tenant has in the bucket."""

    templates: int = 0
    bytes: int = 0
    """Of all objects of its templates, and of each of its layers once."""


class Stored(Model):
    """The content of the object that `stored_name` names."""

    counted: datetime
    tenants: dict[str, TenantStored]

    def of(self, tenant: str) -> TenantStored:
        """Return what a tenant has."""
        return self.tenants.get(tenant, TenantStored())


def count_stored(bucket: Bucket) -> Stored:
    """Look at every object of every template and layer, and keep the sums. Blocking.

    The layers of public images are nobody's.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    templates: defaultdict[str, int] = defaultdict(int)
    size: defaultdict[str, int] = defaultdict(int)
    for _, tenant, stored in _objects(bucket, ObjectKind.TEMPLATE, ObjectKind.LAYER):
        templates[tenant] += is_metadata(stored.name)
        size[tenant] += stored.size_bytes
    sums = {name: TenantStored(templates=templates[name], bytes=size[name]) for name in size}
    counted = Stored(counted=utc_now(), tenants=sums)
    bucket.write_object(stored_name(), counted.model_dump_json().encode())
    return counted


def templates_of(bucket: Bucket, tenant: str) -> set[str]:
    """Return the ids of the builds that have left objects of a template of a tenant, or references
    to layers. Blocking.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    objects = _objects(bucket, ObjectKind.TEMPLATE, ObjectKind.USED_LAYER)
    return {named.build_id for named, whose, _ in objects if whose == tenant}


def read_stored(bucket: Bucket) -> Stored | None:
    """Return what was counted last; None before the first time. Blocking.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    found = bucket.read_object(stored_name())
    if found is None:
        return None
    try:
        return Stored.model_validate_json(found[0])
    except ValidationError:  # of another version: the next sweep writes ours
        return None


def _objects(bucket: Bucket, *kinds: ObjectKind) -> Iterator[tuple[ObjectName, str, StoredObject]]:
    """Yield every object of these kinds that is a tenant's, with what its name says and whose."""
    for stored, metadata in bucket.list_with_metadata():
        named = parse_object_name(stored.name)
        if named is not None and named.kind in kinds:
            nobodys = "" if named.kind is ObjectKind.LAYER else DEFAULT_TENANT
            if whose := metadata.get(TENANT_METADATA, nobodys):
                yield named, whose, stored
