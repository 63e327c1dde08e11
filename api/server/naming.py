"""Names of templates and their tags, as the caller may see them.

The one place where `name:tag` becomes a build's id. What it stands for is then looked for as any
build is: a tag gives no right to see one.
"""

from __future__ import annotations

import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from activities.contract.errors import TemplateNotFoundError
from activities.contract.references import build_id_or_reference, stands_for_a_build
from activities.contract.requests import TemplateConfig
from activities.contract.status import BuildState
from activities.process.clock import utc_now
from api.errors import RETRY_SECONDS, Violation, failed_precondition, invalid_argument
from api.pb import template_manager_pb2 as pb
from api.server.access import Right, current_caller
from api.server.listing import ListedBuild
from api.server.template_bucket import TemplateBucket
from api.server.tenancy import is_visible, tenant_for
from api.server.validation import TEMPLATE_ID, WRONG_TEMPLATE_ID, name_violations, tags_of
from api.server.view import BuildView
from api.server.wire import names_message

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.names import NamedTemplate, TemplateNames, TenantNames

DEFAULT_PAGE, MAX_PAGE = 50, 100
MAX_KEPT = 1_000
MAX_TEMPLATE_ID_CHARS = 63


class TemplateNaming:
    """Answers what is asked about names."""

    def __init__(self, bucket: TemplateBucket) -> None:
        self._bucket = bucket
        self._kept: dict[tuple[str, str], tuple[int, TemplateNames]] = {}

    async def build_id(self, text: str, field: str = "build_id", tenant: str = "") -> str:
        """Return the id of the build that `text` stands for: an id, or a `name:tag`.

        `tenant` is whose the name is where the text does not say it: by default the caller's.
        Raises ApiError INVALID_ARGUMENT, and TemplateNotFoundError when there is no such tag.
        """
        try:
            found = build_id_or_reference(text)
        except ValueError as error:
            raise invalid_argument([Violation(field, str(error))]) from None
        if isinstance(found, str):
            return found
        whose = found.tenant or tenant or current_caller.get().tenant
        if not is_visible(whose):
            raise TemplateNotFoundError(f"there is no template {found}")
        return await self._bucket.names(whose, lambda names: names.resolve(found))

    async def complete(self, request: pb.TemplateCreateRequest) -> None:
        """Put ids in the place of the names in a request: its base, and its template.

        What can be none is left as it is, to be named with all else that is wrong.
        """
        template = request.template
        tenant = tenant_for(template.team_id)
        if template.HasField("from_template"):
            base = template.from_template
            written = base.build_id or base.alias
            if stands_for_a_build(written):
                field = "template.from_template.build_id"
                base.alias = base.alias or written  # the metadata tells it
                base.build_id = await self.build_id(written, field, tenant)
        if template.name and not template.template_id and not name_violations(template.name, ()):
            template.template_id = await self._template_of(tenant, template.name)

    async def await_build(self, config: TemplateConfig) -> None:
        """Let a build's template have its name from now on, and note which tags are to move.

        Raises NameTakenError and NamesBeyondLimitError.
        """
        if config.name is None:
            return
        named = pb.TemplateNameReserveResponse(
            name=config.name,
            template_id=config.template_id,
            build_id=config.build_id,
            tags=config.tags,
        )
        sizes = (config.memory_mb, config.vcpu_count, config.disk_size_mb)
        await self._reserve(named, config.tenant, sizes)

    async def reserve(
        self, request: pb.TemplateNameReserveRequest
    ) -> pb.TemplateNameReserveResponse:
        """Let a name be a template's, and give its next build an id.

        Raises ApiError INVALID_ARGUMENT, NameTakenError and NamesBeyondLimitError.
        """
        wrong = name_violations(request.name, request.tags)
        if request.template_id and not TEMPLATE_ID.fullmatch(request.template_id):
            wrong.append(Violation("template_id", WRONG_TEMPLATE_ID))
        for field in ("memory_mb", "vcpu_count", "disk_size_mb"):
            if getattr(request, field) < 0:
                wrong.append(Violation(field, "must not be negative"))
        if wrong:
            raise invalid_argument(wrong)
        tenant = current_caller.get().tenant
        named = pb.TemplateNameReserveResponse(
            name=request.name,
            template_id=request.template_id or await self._template_of(tenant, request.name),
            build_id=str(uuid.uuid4()),
            tags=tags_of(request.tags),
        )
        sizes = (request.memory_mb, request.vcpu_count, request.disk_size_mb)
        await self._reserve(named, tenant, sizes)
        return named

    async def get(self, request: pb.TemplateNameGetRequest) -> pb.TemplateName:
        """Tell a name and its tags, by the name or by the template.

        Raises ApiError INVALID_ARGUMENT, and TemplateNotFoundError.
        """
        if not request.name:
            return await self._get_by_template(request.template_id)
        tenant, name = _whose(request.name)
        names = None
        if is_visible(tenant):
            names = await self._bucket.names(tenant, lambda names: names.read(name))
        if names is None:
            raise TemplateNotFoundError(f"there is no template {request.name}")
        return names_message(tenant, names)

    async def page(self, request: pb.TemplateNameListRequest) -> pb.TemplateNameListResponse:
        """Tell a page of names, in order."""
        caller = current_caller.get()
        tenant = request.tenant or ("" if caller.right is Right.OPERATOR else caller.tenant)
        if tenant and not is_visible(tenant):
            return pb.TemplateNameListResponse()
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        # In the order of pages: that of objects has `a-b.json` before `a.json`.
        listed = sorted(await self._bucket.list_names(tenant or None), key=_place)
        rest = [named for named in listed if _place(named) > request.page_token]
        page = pb.TemplateNameListResponse()
        for named in rest[:size]:
            if names := await self._read(named):
                page.names.append(names_message(named.tenant, names))
        if len(rest) > size:
            page.next_page_token = _place(rest[size - 1])
        return page

    async def assign(
        self, request: pb.TemplateTagsAssignRequest, build: BuildView
    ) -> pb.TemplateName:
        """Let tags stand for a build.

        Raises ApiError INVALID_ARGUMENT, FAILED_PRECONDITION while it is not published;
        NameTakenError, NamesBeyondLimitError and TemplateNotFoundError.
        """
        _require_name(request.name, request.tags)
        if build.state is not BuildState.COMPLETED:
            raise failed_precondition(
                "BUILD_NOT_PUBLISHED",
                f"build {build.build_id} is {build.state}: a tag stands for what is published",
                "Build it with that name and tag: they move when it is published.",
                retry_after_seconds=None if build.is_closed else RETRY_SECONDS,
            )
        tags, now = tags_of(request.tags), utc_now()
        moved = await self._bucket.names(
            build.tenant,
            lambda names: names.assign(request.name, build.build_id, tags, asked=now),
        )
        return names_message(build.tenant, moved.names)

    async def roll_back(self, request: pb.TemplateTagsAssignRequest) -> pb.TemplateName:
        """Let a tag stand for the build that it stood for before.

        Raises ApiError INVALID_ARGUMENT, and TemplateNotFoundError.
        """
        tenant, name = _whose(request.name, *request.tags)
        tags = tags_of(request.tags)
        if len(tags) > 1:
            raise invalid_argument([Violation("tags", "must be one, to be rolled back")])
        return await self._changed(
            tenant, request.name, lambda names: names.roll_back(name, tags[0], asked=utc_now())
        )

    async def remove(self, request: pb.TemplateTagsRemoveRequest) -> pb.TemplateName:
        """Take tags away, or a name with all of them; tell what is left.

        Raises ApiError INVALID_ARGUMENT, and TemplateNotFoundError.
        """
        tenant, name = _whose(request.name, *request.tags)
        return await self._changed(
            tenant, request.name, lambda names: names.remove_tags(name, request.tags)
        )

    async def tags_of_builds(self, builds: Sequence[ListedBuild]) -> Mapping[str, list[str]]:
        """Return which tags stand for each of these builds, as `name:tag`."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        tenants = {build.tenant for build in builds}
        templates = {build.template_id for build in builds}
        if not tenants:
            return found
        whose = tenants.pop() if len(tenants) == 1 else None
        for named in await self._bucket.list_names(whose, templates):
            names = await self._read(named) if is_visible(named.tenant) else None
            for tag, stands in sorted(names.tags.items()) if names else ():
                found[stands.build_id].append(f"{named.name}:{tag}")
        return found

    async def _changed(
        self, tenant: str, written: str, change: Callable[[TenantNames], TemplateNames]
    ) -> pb.TemplateName:
        if not is_visible(tenant):
            raise TemplateNotFoundError(f"there is no template {written}")
        return names_message(tenant, await self._bucket.names(tenant, change))

    async def _get_by_template(self, template_id: str) -> pb.TemplateName:
        if not TEMPLATE_ID.fullmatch(template_id):
            raise invalid_argument([Violation("template_id", WRONG_TEMPLATE_ID)])
        tenant = current_caller.get().tenant
        names = await self._bucket.names(tenant, lambda names: names.of_template(template_id))
        if names is None:
            raise TemplateNotFoundError(f"template {template_id} has no name")
        return names_message(tenant, names)

    async def _template_of(self, tenant: str, name: str) -> str:
        """Return the id of the template of a name: a new one's is made of the name."""
        names = await self._bucket.names(tenant, lambda names: names.read(name))
        made = re.sub("[^a-z0-9-]", "-", name)[:MAX_TEMPLATE_ID_CHARS]
        return names.template_id if names else made

    async def _read(self, named: NamedTemplate) -> TemplateNames | None:
        """Read what a list has named, unless it is what was read before."""
        place = (named.tenant, named.name)
        kept = self._kept.get(place)
        if kept is not None and kept[0] == named.generation:
            return kept[1]
        names = await self._bucket.names(named.tenant, lambda names: names.read(named.name))
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        if names is not None:
            self._kept[place] = (named.generation, names)
        return names

    async def _reserve(
        self, names: pb.TemplateNameReserveResponse, tenant: str, sizes: tuple[int, int, int]
    ) -> None:
        from activities.store.names import AwaitedBuild

        memory_mb, vcpu_count, disk_size_mb = sizes
        now = utc_now()
        awaited = AwaitedBuild(
            tags=tuple(names.tags),
            asked=now,
            memory_mb=memory_mb,
            vcpu_count=vcpu_count,
            disk_size_mb=disk_size_mb,
        )
        await self._bucket.names(
            tenant,
            lambda known: known.reserve(
                names.name, names.template_id, awaited={names.build_id: awaited}, now=now
            ),
        )


def _whose(written: str, *tags: str) -> tuple[str, str]:
    """Read `[tenant/]name`; without a tenant it is the caller's.

    Raises ApiError INVALID_ARGUMENT when that, or a tag, can be none.
    """
    tenant, _, name = written.rpartition("/")
    _require_name(name, tags)
    return tenant or current_caller.get().tenant, name


def _require_name(name: str, tags: Sequence[str]) -> None:
    if wrong := name_violations(name, tags):
        raise invalid_argument(wrong)


def _place(named: NamedTemplate) -> str:
    return f"{named.tenant}/{named.name}"
