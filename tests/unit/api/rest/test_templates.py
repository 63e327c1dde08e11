"""What a caller writes for a template, and what the gRPC API is asked for."""

from __future__ import annotations

from api.pb import template_manager_pb2 as pb
from api.rest.calls import Calls
from api.rest.templates import base_of, remove_tags


class Asked(Calls):
    """An API where every tenant has a template of every name; it notes what is taken away."""

    def __init__(self) -> None:
        self.removed: list[pb.TemplateTagsRemoveRequest] = []

    async def name(self, request: pb.TemplateNameGetRequest) -> pb.TemplateName:
        tenant, _, name = request.name.rpartition("/")
        return pb.TemplateName(tenant=tenant or "own", name=name, template_id=name)

    async def remove(self, request: pb.TemplateTagsRemoveRequest) -> pb.TemplateName:
        self.removed.append(request)
        return pb.TemplateName()


async def test_a_tenant_that_was_written_is_not_left_out() -> None:
    """An operator's own template of that name would be taken for it."""
    assert (await base_of(Asked(), "acme/web:v1")).alias == "acme/web:v1"
    assert (await base_of(Asked(), "acme/web")).alias == "acme/web"
    assert (await base_of(Asked(), "web:v1")).alias == "web:v1"
    calls = Asked()
    for called in ("acme/web", "web"):
        await remove_tags(calls, called, ["v1"])
    assert [(each.name, [*each.tags]) for each in calls.removed] == [
        ("acme/web", ["v1"]),
        ("web", ["v1"]),
    ]


async def test_a_name_of_an_id_s_digits_is_a_name() -> None:
    digits = "0123456789abcdef0123456789abcdef"
    assert (await base_of(Asked(), digits)).alias == digits
    build_id = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
    assert (await base_of(Asked(), build_id)).build_id == build_id
    assert (await base_of(Asked(), build_id.upper())).build_id == build_id.upper()
