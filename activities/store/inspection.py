"""What a template takes in the bucket: of its own, and in layers that others may share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from activities.contract.results import LayerReference, StoredObject
from activities.store.bucket import Bucket
from activities.store.layers import EVERYBODY, LayerObjects
from activities.store.metadata import TemplateMetadata
from activities.store.objects import is_layer_id, parse_object_name, references_prefix
from activities.store.stored import TENANT_METADATA

MOST_USERS = 1000
"""Of a tenant's layer; more are not told one by one."""
MOST_LOOKED_AT = 20_000
"""References to any other layer, among which the tenant's own are looked for."""


@dataclass(frozen=True)
class SharedLayer:
    """A layer, as the tenant of a template that needs it may know it."""

    layer_id: str
    stored_bytes: int
    is_everybodys: bool
    """Of an image that was pulled without a login: it counts to no tenant."""
    builds: tuple[str, ...]
    """Other builds of the tenant that need it."""
    has_more: bool
    """Whether the tenant may have more of them."""
    is_freed: bool
    """Whether the tenant has it no more when the template is deleted."""


@dataclass(frozen=True)
class StoredTemplate:
    """What a template takes in the bucket."""

    own_bytes: int
    layers: tuple[SharedLayer, ...]
    """Lowest first."""

    @property
    def freed_bytes(self) -> int:
        """What its tenant has less of when it is deleted."""
        return self.own_bytes + sum(each.stored_bytes for each in self.layers if each.is_freed)


def inspect_template(bucket: Bucket, metadata: TemplateMetadata) -> StoredTemplate:
    """Look at a template's layers and at who else needs them. Blocking.

    It costs two or three requests a layer, more of one that is everybody's: its references are read
    a thousand at a time. Raises StorageUnavailableError and StorageDeniedError.
    """
    shared: list[SharedLayer] = []
    for layer in reversed(metadata.layers):
        freed = {each.layer_id for each in shared if each.is_freed}
        shared.append(_shared(bucket, layer, metadata, freed))
    of_layers = {stored.name for layer in metadata.layers for stored in layer.objects.values()}
    own = [stored for stored in metadata.objects() if stored.name not in of_layers]
    return StoredTemplate(_bytes(own), tuple(reversed(shared)))


def _shared(
    bucket: Bucket, layer: LayerReference, metadata: TemplateMetadata, freed: set[str]
) -> SharedLayer:
    record = LayerObjects(bucket).read(layer.layer_id)
    tenant, listed = metadata.config.tenant, _users(bucket, layer.layer_id)
    is_tenants = record is not None and record.owner == tenant
    if not is_tenants:  # nothing that is told may show how many others there are
        looked_at = islice(listed, MOST_LOOKED_AT)
        listed = (each for each in looked_at if each[1] == tenant)
    users = dict(islice(listed, MOST_USERS))
    has_more = len(users) == MOST_USERS
    users.pop(metadata.build_id, None)
    return SharedLayer(
        layer_id=layer.layer_id,
        stored_bytes=_bytes(layer.objects.values()),
        is_everybodys=record is not None and record.owner == EVERYBODY,
        builds=tuple(sorted(user for user, whose in users.items() if whose == tenant)),
        has_more=has_more,
        is_freed=is_tenants and not has_more and users.keys() <= freed,
    )


def _users(bucket: Bucket, layer_id: str) -> Iterator[tuple[str, str]]:
    """Yield who needs a layer, and whose build that is; '' for a layer."""
    for stored, metadata in bucket.list_with_metadata(references_prefix(layer_id)):
        named = parse_object_name(stored.name)
        user = named.build_id if named else stored.name
        yield user, "" if is_layer_id(user) else metadata.get(TENANT_METADATA, "")


def _bytes(objects: Iterable[StoredObject]) -> int:
    return sum(stored.size_bytes for stored in objects)
