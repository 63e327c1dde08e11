"""What a template takes in the bucket: of its own, and in layers that others may share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from activities.contract.results import LayerReference, StoredObject
from activities.store.bucket import Bucket
from activities.store.layers import EVERYBODY, LayerObjects
from activities.store.metadata import TemplateMetadata
from activities.store.objects import is_layer_id, parse_object_name, references_prefix
from activities.store.stored import TENANT_METADATA

MOST_USERS = 1000
"""References that are looked at of one layer: more are not told one by one."""


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
    """Whether there may be more of them."""
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

    It costs two or three requests a layer. Raises StorageUnavailableError and StorageDeniedError.
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
    is_everybodys = record is not None and record.owner == EVERYBODY
    listed = bucket.list_with_metadata(references_prefix(layer.layer_id))
    users = dict(_user(*each) for each in islice(listed, MOST_USERS))
    users.pop(metadata.build_id, None)
    has_more = len(users) >= MOST_USERS - 1
    tenant = metadata.config.tenant
    return SharedLayer(
        layer_id=layer.layer_id,
        stored_bytes=_bytes(layer.objects.values()),
        is_everybodys=is_everybodys,
        builds=tuple(sorted(user for user, whose in users.items() if whose == tenant)),
        has_more=has_more,
        # Whether others need what is everybody's is nobody's business.
        is_freed=record is not None
        and not is_everybodys
        and not has_more
        and users.keys() <= freed,
    )


def _user(stored: StoredObject, metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return who needs the layer, and whose build that is; '' for a layer."""
    named = parse_object_name(stored.name)
    user = named.build_id if named else stored.name
    return user, "" if is_layer_id(user) else metadata.get(TENANT_METADATA, "")


def _bytes(objects: Iterable[StoredObject]) -> int:
    return sum(stored.size_bytes for stored in objects)
