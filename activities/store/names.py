"""Names of templates and their tags: one object for each template, `names/<tenant>/<name>.json`.

A tag stands for a published build. All tags that a build gets move by one write, which names the
generation that was read: nobody sees half of it, and of two at once one looks again.
All functions are blocking, and raise StorageUnavailableError and StorageDeniedError.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import Field, ValidationError

from activities.contract.errors import (
    NamesBeyondLimitError,
    NameTakenError,
    PreconditionFailedError,
    StorageUnavailableError,
    TemplateDamagedError,
    TemplateNotFoundError,
)
from activities.contract.model import Model
from activities.contract.names import DEFAULT_TENANT, BuildId, TemplateId
from activities.contract.references import (
    TagName,
    TemplateName,
    TemplateReference,
    build_id_or_reference,
)
from activities.store.bucket import Bucket
from activities.store.metadata import read_metadata
from activities.store.objects import names_object, names_prefix, parse_names_object

MAX_NAMES = 1_000
"""Of a tenant."""
MAX_TAGS = 100
"""Of a name."""
MAX_AWAITED = 100
MAX_PREVIOUS = 5
TEMPLATE = "template_id"
"""In the custom metadata, so that a list says whose names are whose."""
TRIES = 40
WAIT_SECONDS = 0.05


class Tag(Model):
    """What a tag stands for."""

    build_id: BuildId
    asked: datetime
    """When it was asked for: a build that was asked for earlier and ends later does not move it."""
    previous: tuple[BuildId, ...] = ()
    """What it stood for before, the latest first."""

    def moved(self, build_id: str, asked: datetime) -> Tag:
        """Return it for another build."""
        before = (self.build_id, *self.previous)
        previous = tuple(each for each in before if each != build_id)[:MAX_PREVIOUS]
        return Tag(build_id=build_id, asked=max(asked, self.asked), previous=previous)

    def rolled_back(self, asked: datetime) -> Tag:
        """Return it for the build before; there must be one."""
        target, *earlier = self.previous
        return Tag(build_id=target, asked=max(asked, self.asked), previous=tuple(earlier))


class AwaitedBuild(Model):
    """A build that is to have tags when it is published."""

    tags: tuple[TagName, ...]
    asked: datetime
    memory_mb: int = 0
    vcpu_count: int = 0
    disk_size_mb: int = 0
    """What a client has said of it already; 0 is nothing."""


class TemplateNames(Model):
    """The content of a template's object."""

    format_version: int = 1
    name: TemplateName
    template_id: TemplateId
    created: datetime
    tags: dict[TagName, Tag] = Field(default_factory=dict)
    awaited: dict[BuildId, AwaitedBuild] = Field(default_factory=dict)

    def tags_of(self, build_id: str) -> list[str]:
        """Return the tags that stand for a build."""
        return sorted(tag for tag, stands in self.tags.items() if stands.build_id == build_id)

    def without_build(self, build_id: str) -> TemplateNames:
        """Return it as if that build had never been."""
        tags = {
            name: tag.model_copy(
                update={"previous": tuple(each for each in tag.previous if each != build_id)}
            )
            for name, tag in self.tags.items()
            if tag.build_id != build_id
        }
        awaited = {each: what for each, what in self.awaited.items() if each != build_id}
        return self.model_copy(update={"tags": tags, "awaited": awaited})


@dataclass(frozen=True)
class NamedTemplate:
    """A name in a list."""

    tenant: str
    name: str
    template_id: str
    generation: int


@dataclass(frozen=True)
class Moved:
    """What has come of moving tags to a build."""

    names: TemplateNames
    kept: tuple[str, ...]
    """Those that stand for what was asked for later."""


class TenantNames:
    """The names of one tenant's templates."""

    def __init__(self, bucket: Bucket, tenant: str) -> None:
        self._bucket = bucket
        self._tenant = tenant

    def read(self, name: str) -> TemplateNames | None:
        """Return a name with its tags; None when the tenant has no such name."""
        found = self._bucket.read_object(names_object(self._tenant, name))
        return _parsed(found[0], name) if found else None

    def of_template(self, template_id: str) -> TemplateNames | None:
        """Return the name of a template with its tags; None when it has none."""
        for named in list_names(self._bucket, self._tenant, {template_id}):
            return self.read(named.name)
        return None

    def resolve(self, reference: TemplateReference) -> str:
        """Return the build that a tag stands for. Raises TemplateNotFoundError."""
        names = self.read(reference.name)
        tag = names.tags.get(reference.tag) if names else None
        if tag is None:
            raise TemplateNotFoundError(f"there is no template {reference}")
        return tag.build_id

    def reserve(
        self,
        name: str,
        template_id: str,
        *,
        awaited: Mapping[str, AwaitedBuild],
        now: datetime,
    ) -> TemplateNames:
        """Let a name be a template's, and note the tags that builds are to have.

        Raises NameTakenError when it is another template's, NamesBeyondLimitError.
        """

        def change(names: TemplateNames | None) -> TemplateNames:
            kept = self._or_new(names, name, template_id, now)
            waiting = sorted({**kept.awaited, **awaited}.items(), key=lambda item: item[1].asked)
            return kept.model_copy(update={"awaited": dict(waiting[-MAX_AWAITED:])})

        return self._changed(name, change)

    def assign(self, name: str, build_id: str, tags: Sequence[str], *, asked: datetime) -> Moved:
        """Let tags of a name stand for a published build of the tenant's: all of them at once.

        Raises TemplateNotFoundError when the build is not published, NameTakenError when the name
        is another template's, NamesBeyondLimitError.
        """
        metadata = read_metadata(self._bucket, build_id)
        if metadata is None or metadata.config.tenant != self._tenant:
            raise TemplateNotFoundError(f"build {build_id} is not published")
        template_id = metadata.template_id

        def change(names: TemplateNames | None) -> TemplateNames:
            kept = self._or_new(names, name, template_id, asked)
            moved = {tag: _moved(kept.tags.get(tag), build_id, asked) for tag in tags}
            awaited = {each: what for each, what in kept.awaited.items() if each != build_id}
            return kept.model_copy(update={"tags": {**kept.tags, **moved}, "awaited": awaited})

        names = self._changed(name, change)
        if read_metadata(self._bucket, build_id) is None:  # a delete may have looked before that
            self.remove_build(build_id, template_id)
            raise TemplateNotFoundError(f"build {build_id} has been deleted")
        return Moved(names, tuple(tag for tag in tags if names.tags[tag].build_id != build_id))

    def roll_back(self, name: str, tag: str, *, asked: datetime) -> TemplateNames:
        """Let a tag stand for the build that it stood for before.

        Raises TemplateNotFoundError when there is none.
        """
        names = self.read(name)
        before = names.tags.get(tag) if names else None
        if before is None or not before.previous:
            if before is None:
                raise TemplateNotFoundError(_no_tag(name, tag))
            why = f"{name}:{tag} has stood for no other build"
            raise TemplateNotFoundError(why, hint="Let it stand for a build that you name.")

        def change(names: TemplateNames | None) -> TemplateNames:
            now = names.tags.get(tag) if names else None
            if names is None or now is None:
                raise TemplateNotFoundError(_no_tag(name, tag))
            if now.build_id != before.build_id:  # by a try of this call whose answer was lost, too
                return names
            rolled = {**names.tags, tag: before.rolled_back(asked)}
            return names.model_copy(update={"tags": rolled})

        return self._changed(name, change)

    def remove_tags(self, name: str, tags: Sequence[str]) -> TemplateNames:
        """Take tags away, or all of them and the name when none is told; return what is left.

        Raises TemplateNotFoundError when there is no such name.
        """
        left: TemplateNames | None = None

        def change(names: TemplateNames | None) -> TemplateNames | None:
            nonlocal left
            if names is None:
                raise TemplateNotFoundError(f"there is no template {name}")
            kept = {tag: stands for tag, stands in names.tags.items() if tags and tag not in tags}
            left = names.model_copy(update={"tags": kept})
            return left if tags else None

        self._change(name, change)
        assert left is not None
        return left

    def remove_build(
        self, build_id: str, template_id: str | None, check: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Take a build out of the name of its template, or of any when that is not known.

        A name that has no tag and waits for no build any more goes, too. `check` is called between
        reading and writing, and ends it by raising. Returns what is gone: `name:tag`, and `name`.
        """

        def change(names: TemplateNames | None) -> TemplateNames | None:
            check()
            return _without_build(build_id, names)

        templates = {template_id} if template_id else None
        gone: list[str] = []
        for named in list(list_names(self._bucket, self._tenant, templates)):
            names = self.read(named.name)
            if names is not None and names.without_build(build_id) != names:
                gone += [f"{named.name}:{tag}" for tag in names.tags_of(build_id)]
                if self._change(named.name, change) is None:
                    gone.append(named.name)
        return gone

    def _or_new(
        self, names: TemplateNames | None, name: str, template_id: str, now: datetime
    ) -> TemplateNames:
        """Return the names as they are, or new ones.

        Raises NameTakenError and NamesBeyondLimitError.
        """
        if names is None:
            self._require_room(name, template_id)
            return TemplateNames(name=name, template_id=template_id, created=now)
        if names.template_id != template_id:
            raise NameTakenError(f"the name {name} is that of template {names.template_id}")
        return names

    def _require_room(self, name: str, template_id: str) -> None:
        count = 0
        for named in list_names(self._bucket, self._tenant):
            count += 1
            if named.template_id == template_id and named.name != name:  # made just now
                raise NameTakenError(f"template {template_id} has a name, which is {named.name}")
        if count >= MAX_NAMES:
            raise NamesBeyondLimitError(
                f"tenant {self._tenant} has {count} names; {MAX_NAMES} are allowed"
            )

    def _changed(
        self, name: str, change: Callable[[TemplateNames | None], TemplateNames]
    ) -> TemplateNames:
        changed = self._change(name, change)
        assert changed is not None
        return changed

    def _change(
        self, name: str, change: Callable[[TemplateNames | None], TemplateNames | None]
    ) -> TemplateNames | None:
        """Write what `change` makes of a name, again while others do the same; None removes it."""
        place = names_object(self._tenant, name)
        for _ in range(TRIES):
            found = self._bucket.read_object(place)
            names = _parsed(found[0], name) if found else None
            changed = change(names)
            if changed == names or self._written(place, found[1] if found else 0, changed):
                return changed
            time.sleep(random.uniform(0, WAIT_SECONDS))  # noqa: S311 # only to step aside
        raise StorageUnavailableError(f"the tags of {name} are being moved by others")

    def _written(self, place: str, generation: int, names: TemplateNames | None) -> bool:
        if names is None:
            return self._bucket.delete_object(place, generation)
        if len(names.tags) > MAX_TAGS:
            raise NamesBeyondLimitError(
                f"{names.name} would have {len(names.tags)} tags; {MAX_TAGS} are allowed"
            )
        content, metadata = names.model_dump_json().encode(), {TEMPLATE: names.template_id}
        try:
            self._bucket.write_object(
                place, content, if_generation_match=generation, metadata=metadata
            )
        except PreconditionFailedError:
            return False
        return True


def find_build(bucket: Bucket, text: str) -> str:
    """Return the build that an id or `[tenant/]name:tag` stands for, for who has the whole bucket.

    Raises TemplateNotFoundError.
    """
    try:
        found = build_id_or_reference(text)
    except ValueError as error:
        raise TemplateNotFoundError(f"{text[:80]}: {error}") from None
    if isinstance(found, str):
        return found
    return TenantNames(bucket, found.tenant or DEFAULT_TENANT).resolve(found)


def list_names(
    bucket: Bucket, tenant: str | None, templates: Container[str] | None = None
) -> Iterator[NamedTemplate]:
    """Yield the names of a tenant, or of all, in order: by default those of all templates."""
    for stored, metadata in bucket.list_with_metadata(names_prefix(tenant)):
        named, template_id = parse_names_object(stored.name), metadata.get(TEMPLATE, "")
        if named is not None and (templates is None or template_id in templates):
            yield NamedTemplate(*named, template_id, stored.generation)


def _without_build(build_id: str, names: TemplateNames | None) -> TemplateNames | None:
    left = names.without_build(build_id) if names else None
    return left if left and (left.tags or left.awaited) else None


def _moved(tag: Tag | None, build_id: str, asked: datetime) -> Tag:
    if tag is None:
        return Tag(build_id=build_id, asked=asked)
    return tag if tag.asked > asked or tag.build_id == build_id else tag.moved(build_id, asked)


def _no_tag(name: str, tag: str) -> str:
    return f"there is no template {name}:{tag}"


def _parsed(content: bytes, name: str) -> TemplateNames:
    try:
        return TemplateNames.model_validate_json(content)
    except ValidationError as error:
        raise TemplateDamagedError(f"the tags of {name} cannot be read") from error
