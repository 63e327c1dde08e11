"""Layers of disks: stored once, found by key from every host, kept while somebody needs them.

A layer is one disk of a chain, stored as the blocks that the layers below it do not have:
`<layer_id>/rootfs.ext4`, its `.header`, and `layer.json`. The id is made of what the disk was made
of, so that every host finds it.

`layer.json` decides. Each change of it names the generation that it replaces, so of all who would
change it one does:

    (none) ──claim──▶ making ──commit──▶ whole ◀──▶ dying ──▶ making (by nobody) ──▶ (none)

- Data and header are written and removed only by who has brought it to `making`, and are always new
  ones: what lies there from before is removed first, by the generations of before the claim.
- Who needs a layer writes a reference, `<layer_id>/.refs/<user>`, and then reads `layer.json`: it
  may rely on a layer that is `whole` then. A collector makes it `dying`, and then looks for
  references: it sees those of all who read `whole` before. Where there is one it becomes `whole`
  again, by a write that fails once the layer is being removed.
- A user is a build, or the layer directly above, so a chain loses its upper part first. A build has
  a list of its references: `<build_id>/.layers/<layer_id>`, written before each. So ending its use
  costs the same however many others there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

from pydantic import Field, ValidationError

from activities.contract.checkpoints import RootfsFacts
from activities.contract.errors import PreconditionFailedError
from activities.contract.model import Model
from activities.contract.names import ArtifactName, BuildId, Fingerprint, Step
from activities.contract.results import LayerReference, StoredObject
from activities.contract.scope import BuildScope
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.objects import (
    artifact_name,
    layer_record_name,
    parse_object_name,
    reference_name,
    references_prefix,
    used_layer_name,
    used_layers_prefix,
)
from activities.store.stored import TENANT_METADATA

A = TypeVar("A")
R = TypeVar("R")

FORMAT_VERSION = 1
EVERYBODY = ""
"""Owner of the layers of images that were pulled without a login. No tenant has this name."""
NOBODY = ""
"""Maker of what is being removed."""
AT_ONCE = 8
RACES = 4
NOTED_EVERY = timedelta(hours=1)
"""How exactly a layer knows its last use: an object is not to be written at each build's end."""
DYING_METADATA = "dying"
MAKING_METADATA = "making"
"""In the custom metadata of `layer.json`, so that a listing tells: the maker, or NOBODY."""


class LayerRecord(Model):
    """The content of the `layer.json` of a layer that is whole."""

    format_version: int = FORMAT_VERSION
    layer_id: BuildId
    owner: str
    """The tenant whose it is, or EVERYBODY."""
    step: Step
    fingerprint: Fingerprint
    """Of the checkpoint whose disk it is."""
    created: datetime
    size_bytes: int
    """Of the disk that it and those below it make."""
    sha256: str
    """Of that disk, holes read as zeros."""
    stored_bytes: int
    objects: dict[str, StoredObject]
    """`data` and `header`."""
    below: tuple[LayerReference, ...] = ()
    """Lowest first."""
    facts: RootfsFacts
    dying: bool = Field(default=False, exclude_if=operator.not_)
    """Whether somebody is about to remove it: it is not to be relied on."""
    used: datetime | None = Field(default=None, exclude_if=operator.not_)
    """When a use of it has ended, noted once in NOTED_EVERY; None: not since it was made."""

    @property
    def last_used(self) -> datetime:
        """Return when it was made or noted to be used, whichever is later."""
        return self.used or self.created

    def is_of(self, asked: str) -> bool:
        """Whether it is what is to be found under that id, which is made of what it says."""
        return self.layer_id == asked == layer_id(self.owner, self.step, self.fingerprint)

    @property
    def reference(self) -> LayerReference:
        """What names it elsewhere."""
        return LayerReference(layer_id=self.layer_id, objects=self.objects)


class _Making(Model):
    """The content of the `layer.json` of a layer that is being written or removed."""

    making: str
    """The build that writes it, or NOBODY."""


class _Found(NamedTuple):
    content: LayerRecord | _Making | None
    """None: not readable, or of a later version."""
    generation: int
    """0: there is none."""


class LayerClaim(NamedTuple):
    """The right to write the objects of a layer, until somebody takes it over."""

    layer_id: str
    build_id: str
    generation: int


def layer_id(owner: str, step: Step, fingerprint: str) -> str:
    """Return the id of the layer of a checkpoint: a UUID of version 8, the same on every host.

    `owner` is the tenant, or EVERYBODY.
    """
    key = hashlib.sha256(json.dumps([owner, step, fingerprint]).encode()).digest()
    bits = int.from_bytes(key[:16])
    bits = bits & ~(0xF << 76) | 8 << 76  # the version
    bits = bits & ~(0b11 << 62) | 0b10 << 62  # the variant
    return str(uuid.UUID(int=bits))


def layer_metadata(owner: str) -> dict[str, str]:
    """Return the custom metadata of a layer's objects: whose they are, if not everybody's."""
    return {TENANT_METADATA: owner} if owner != EVERYBODY else {}


class LayerObjects:
    """The layers of a bucket. Blocking.

    Everything raises StorageUnavailableError and StorageDeniedError.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    # ---- Using

    def refer(self, layer_id: str, scope: BuildScope) -> LayerRecord | None:
        """Name a layer for a build, and return it; None when it is not to be relied on.

        The reference stays until the build's are released, also when None is returned: another
        attempt of the build may have found it whole.
        """
        self._name(layer_id, scope)
        return self.read(layer_id)

    def refer_all(self, layers: Sequence[LayerReference], scope: BuildScope) -> list[str]:
        """Name layers for a build; returns the ids of those that are not what is said of them."""

        def is_wrong(layer: LayerReference) -> bool:
            found = self.refer(layer.layer_id, scope)
            return found is None or found.reference != layer

        wrong = _at_once(is_wrong, layers)
        return [layer.layer_id for layer, is_bad in zip(layers, wrong, strict=True) if is_bad]

    def read(self, layer_id: str) -> LayerRecord | None:
        """Return a layer; None when it is not whole. Who relies on it refers to it instead."""
        content = self._look(layer_id).content
        return content if isinstance(content, LayerRecord) and not content.dying else None

    # ---- Making

    def claim(self, layer_id: str, scope: BuildScope) -> LayerClaim | None:
        """Take the right to write a layer, and name it; None when it is there or another's.

        What an earlier attempt of the build has left is removed: both objects are to be written
        as new ones.
        """
        self._name(layer_id, scope)
        found = self._look(layer_id)
        if not _may_be_made_by(scope.build_id, found):
            return None
        generation = self._take(layer_id, found.generation, scope.build_id)
        return None if generation is None else LayerClaim(layer_id, scope.build_id, generation)

    def commit(self, record: LayerRecord, claim: LayerClaim) -> LayerRecord | None:
        """Make a layer whole whose objects have been written; returns what is there then.

        That is another's when the claim was taken over, and None when it is not whole: also when
        an object is not what the record says.
        """
        if any(self._bucket.stat_object(o.name) != o for o in record.objects.values()):
            return None
        if record.below:
            self._write_anew(reference_name(record.below[-1].layer_id, record.layer_id))
        self._replace(record.layer_id, record, claim.generation)
        return self.read(record.layer_id)

    def abandon(self, claim: LayerClaim) -> None:
        """Give up writing a layer."""
        self._remove(claim.layer_id, claim.generation)

    # ---- Removing

    def uses(self, build_id: str) -> list[StoredObject]:
        """Return a build's list.

        Who looks whether there is a template before it lets go lists first: it may be held up for
        so long that another run has published one meanwhile.
        """
        return self._bucket.list_objects(used_layers_prefix(build_id))

    def release(
        self,
        build_id: str,
        uses: Iterable[StoredObject],
        *,
        keep: Collection[str] = (),
        collect: bool = False,
    ) -> list[str]:
        """End a build's use of what is in its list, but of layers to `keep`; returns of which.

        What it has not finished to write is removed; with `collect` also each layer that nobody
        needs now. A reference that another run of the build has made since the listing stays.
        """
        ended = [use for use in uses if _layer_of(use) not in keep]
        _at_once(lambda use: self._release(build_id, use, collect=collect), ended)
        return [_layer_of(use) for use in ended]

    def collect(self, layer_id: str, unused_since: float | None = None) -> bool:
        """Remove a layer that nobody needs, and those below that only it needed.

        Of these only what has not been used since then, in seconds of the wall clock. False when it
        stays, or is not there. Goes on with what a crash has left half removed.
        """
        found = self._look(layer_id)
        record = found.content
        if isinstance(record, _Making):
            return record.making == NOBODY and self._remove(layer_id, found.generation)
        if record is None:
            return False
        if record.dying:
            return self._end(record, found.generation, unused_since)
        if unused_since is not None and record.last_used.timestamp() >= unused_since:
            return False
        if self._is_used(layer_id):  # most are: builds do not find it dying for a moment
            return False
        dying = record.model_copy(update={"dying": True})
        generation = self._replace(layer_id, dying, found.generation)
        return generation is not None and self._end(record, generation, unused_since)

    def clear(self, layer_id: str) -> bool:
        """Remove what somebody has begun to write and never will finish; False when it is whole."""
        found = self._look(layer_id)
        if found.generation and not isinstance(found.content, _Making):
            return False
        return self._remove(layer_id, found.generation)

    # ---- The steps of these

    def _name(self, layer_id: str, scope: BuildScope) -> None:
        whose = {TENANT_METADATA: scope.tenant}
        self._write_anew(used_layer_name(scope.build_id, layer_id), whose)
        self._write_anew(reference_name(layer_id, scope.build_id), whose)

    def _write_anew(self, name: str, metadata: Mapping[str, str] | None = None) -> None:
        """Write an empty object as a new generation: who removes an earlier one lets it be."""
        generation = 0
        for _ in range(RACES):
            with contextlib.suppress(PreconditionFailedError):
                self._bucket.write_object(
                    name, b"", if_generation_match=generation, metadata=metadata
                )
                return
            there = self._bucket.stat_object(name)
            generation = there.generation if there else 0
        raise PreconditionFailedError(f"{name} is being written again and again")

    def _look(self, layer_id: str) -> _Found:
        found = self._bucket.read_object(layer_record_name(layer_id))
        return _Found(None, 0) if found is None else _Found(_content(found[0], layer_id), found[1])

    def _replace(
        self, layer_id: str, content: LayerRecord | _Making, generation: int
    ) -> int | None:
        """Write `layer.json` in the place of that generation; None when it is another by now."""
        name, data = layer_record_name(layer_id), content.model_dump_json(indent=2).encode()
        try:
            return self._bucket.write_object(
                name, data, if_generation_match=generation, metadata=_told(content)
            ).generation
        except PreconditionFailedError:
            return None

    def _is_used(self, layer_id: str) -> bool:
        return self._bucket.has_any(references_prefix(layer_id))

    def _end(self, record: LayerRecord, generation: int, unused_since: float | None) -> bool:
        """Remove a layer that is dying in that generation, unless somebody needs it."""
        if not self._is_used(record.layer_id):
            return self._remove(record.layer_id, generation, record, unused_since)
        self._replace(record.layer_id, record.model_copy(update={"dying": False}), generation)
        return False

    def _remove(
        self,
        layer_id: str,
        generation: int,
        record: LayerRecord | None = None,
        unused_since: float | None = None,
    ) -> bool:
        below = record.below[-1].layer_id if record and record.below else ""
        held = self._bucket.stat_object(reference_name(below, layer_id)) if below else None
        taken = self._take(layer_id, generation, NOBODY)
        if taken is None:
            return False
        if held is not None:
            self._bucket.delete_object(held.name, held.generation)
        self._bucket.delete_object(layer_record_name(layer_id), taken)
        if below:
            self.collect(below, unused_since)
        return True

    def _take(self, layer_id: str, generation: int, maker: str) -> int | None:
        """Become the one who writes, and remove what has been written before."""
        # Listed before: whoever takes it over later writes generations that are not in the list.
        left = self._bucket.list_objects(artifact_name(layer_id, ArtifactName.ROOTFS))
        taken = self._replace(layer_id, _Making(making=maker), generation)
        if taken is not None:
            self._bucket.delete_objects(left)
        return taken

    def _release(self, build_id: str, use: StoredObject, *, collect: bool) -> None:
        layer_id = _layer_of(use)
        held = self._bucket.stat_object(reference_name(layer_id, build_id))
        # Looked at after the reference: while it is the one that was listed, so is the reference.
        if self._bucket.stat_object(use.name) != use:
            return
        found = self._look(layer_id)
        if not collect:
            self._note_use(found)
        if held is not None:
            self._bucket.delete_object(held.name, held.generation)
        if isinstance(found.content, _Making) and found.content.making == build_id:
            self._remove(layer_id, found.generation)
        elif collect:
            self.collect(layer_id)
        self._bucket.delete_object(use.name, use.generation)

    def _note_use(self, found: _Found) -> None:
        """Write down that a layer has been used, so that it is not taken for its age."""
        record, now = found.content, utc_now()
        if not isinstance(record, LayerRecord) or record.dying:
            return
        if now - record.last_used >= NOTED_EVERY:
            used = record.model_copy(update={"used": now})
            self._replace(record.layer_id, used, found.generation)  # or another has, just now


def _content(data: bytes, layer_id: str) -> LayerRecord | _Making | None:
    with contextlib.suppress(ValidationError):
        return _Making.model_validate_json(data)
    with contextlib.suppress(ValidationError):
        record = LayerRecord.model_validate_json(data)
        return record if record.is_of(layer_id) else None
    return None


def _told(content: LayerRecord | _Making) -> dict[str, str]:
    """Return the custom metadata of a `layer.json`."""
    if isinstance(content, _Making):
        return {MAKING_METADATA: content.making}
    return layer_metadata(content.owner) | ({DYING_METADATA: "1"} if content.dying else {})


def _may_be_made_by(build_id: str, found: _Found) -> bool:
    if isinstance(found.content, _Making):
        return found.content.making in (build_id, NOBODY)
    return found.generation == 0


def _layer_of(use: StoredObject) -> str:
    named = parse_object_name(use.name)
    return named.layer_id if named else ""


def _at_once(do: Callable[[A], R], each: Iterable[A]) -> list[R]:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="layers") as pool:
        return list(pool.map(do, each))
