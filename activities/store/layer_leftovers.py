"""What of layers may be left over: half written, half removed, unused for long, named by nobody.

One listing of the layers' objects tells all of it; `layers` decides again when it is removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

from activities.contract.results import StoredObject
from activities.disk.leftovers import Leftover
from activities.store.bucket import Bucket, Listed
from activities.store.layers import DYING_METADATA, MAKING_METADATA, LayerObjects
from activities.store.objects import (
    LAYERS_GLOB,
    METADATA_GLOB,
    USED_LAYERS_GLOB,
    ObjectKind,
    is_layer_id,
    layer_record_name,
    metadata_name,
    parse_object_name,
)
from activities.store.stored import TENANT_METADATA


@dataclass
class _Layer:
    """What a listing has of a layer."""

    layer_id: str
    record: Listed | None = None
    blocks: list[Listed] = field(default_factory=list)
    users: dict[str, Listed] = field(default_factory=dict)
    is_build: bool = False
    """Whether it is none, but a build of before, when these could have ids of version 8."""

    @property
    def is_dying(self) -> bool:
        return self.record is not None and DYING_METADATA in self.record.metadata

    @property
    def bytes(self) -> int:
        return sum(each.stored.size_bytes for each in self.blocks)

    @property
    def written_at(self) -> float:
        return max((each.written_at for each in (self.record, *self.blocks) if each), default=0.0)


def leftover_layers(bucket: Bucket, unused_since: float) -> Iterator[Leftover]:
    """Yield layers that nobody needs and that were not used since then (seconds of the wall clock),
    and what is none any more.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    layers, found = LayerObjects(bucket), _found(bucket)
    for layer in found.values():
        if layer.is_build:
            continue
        if layer.record is None or MAKING_METADATA in layer.record.metadata:
            yield from _unfinished(layers, layer)
        elif layer.is_dying or (not layer.users and layer.written_at < unused_since):
            yield _leftover(layer, partial(layers.collect, layer.layer_id, unused_since))
        yield from _held_by_nothing(bucket, layer, found)


def leftover_uses(bucket: Bucket) -> Iterator[Leftover]:
    """Yield the lists of the layers that builds without a template name; one for each build.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    uses: defaultdict[str, list[Listed]] = defaultdict(list)
    for listed in bucket.look_through(USED_LAYERS_GLOB):
        named = parse_object_name(listed.stored.name)
        if named is not None and named.kind is ObjectKind.USED_LAYER:
            uses[named.build_id].append(listed)
    for build_id in uses.keys() - _published(bucket):
        yield Leftover(
            ObjectKind.USED_LAYER,
            build_id,
            partial(_release, bucket, build_id, [each.stored for each in uses[build_id]]),
            build_id,
            made_at=max(each.written_at for each in uses[build_id]),
        )


def collect_all_of(bucket: Bucket, tenant: str) -> None:
    """Remove the layers of a tenant that nobody needs. Blocking.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    layers = LayerObjects(bucket)
    for layer in _found(bucket).values():
        if layer.record and layer.record.metadata.get(TENANT_METADATA) == tenant:
            layers.collect(layer.layer_id)  # those below go with it


def _release(bucket: Bucket, build_id: str, uses: Collection[StoredObject]) -> None:
    # It may have been published since.
    if bucket.stat_object(metadata_name(build_id)) is None:
        LayerObjects(bucket).release(build_id, uses)


def _published(bucket: Bucket) -> set[str]:
    names = (parse_object_name(each.stored.name) for each in bucket.look_through(METADATA_GLOB))
    return {named.build_id for named in names if named and named.kind is ObjectKind.TEMPLATE}


def _found(bucket: Bucket) -> dict[str, _Layer]:
    found: dict[str, _Layer] = {}
    for listed in bucket.look_through(LAYERS_GLOB):
        named = parse_object_name(listed.stored.name)
        if named is None:
            continue
        if named.kind in (ObjectKind.TEMPLATE, ObjectKind.PART) and is_layer_id(named.build_id):
            found.setdefault(named.build_id, _Layer(named.build_id)).is_build = True
        if named.kind not in (ObjectKind.LAYER, ObjectKind.REFERENCE):
            continue
        layer = found.setdefault(named.layer_id, _Layer(named.layer_id))
        if named.kind is ObjectKind.REFERENCE:
            layer.users[named.build_id] = listed
        elif listed.stored.name == layer_record_name(named.layer_id):
            layer.record = listed
        else:
            layer.blocks.append(listed)
    return found


def _unfinished(layers: LayerObjects, layer: _Layer) -> Iterator[Leftover]:
    if layer.record is not None or layer.blocks:
        maker = layer.record.metadata[MAKING_METADATA] if layer.record else ""
        yield _leftover(layer, partial(layers.clear, layer.layer_id), maker)


def _held_by_nothing(bucket: Bucket, layer: _Layer, found: dict[str, _Layer]) -> Iterator[Leftover]:
    """Yield references by layers that are not there; those of builds are found by their lists."""
    for user, listed in layer.users.items():
        by = found.get(user)
        if is_layer_id(user) and (by is None or (by.record is None and not by.is_build)):
            yield Leftover(
                ObjectKind.REFERENCE,
                listed.stored.name,
                partial(_let_go, bucket, user, listed.stored),
                made_at=listed.written_at,
            )


def _let_go(bucket: Bucket, user: str, reference: StoredObject) -> None:
    if bucket.stat_object(layer_record_name(user)) is None:
        bucket.delete_object(reference.name, reference.generation)


def _leftover(layer: _Layer, remove: partial[bool], build_id: str = "") -> Leftover:
    return Leftover(
        ObjectKind.LAYER,
        layer.layer_id,
        remove,
        build_id,
        made_at=layer.written_at,
        bytes=layer.bytes,
    )
