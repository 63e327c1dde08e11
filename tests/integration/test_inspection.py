"""`inspect`: what a template takes in the bucket, what it shares, and what a delete would free."""

from __future__ import annotations

import uuid

import pytest

from activities.contract.names import ArtifactName
from activities.store import inspection
from activities.store.bucket import Bucket
from activities.store.inspection import inspect_template
from activities.store.layers import EVERYBODY, LayerObjects, LayerRecord
from activities.store.metadata import TemplateMetadata
from activities.store.objects import metadata_name
from tests.support.command_line import cli
from tests.support.example_template import metadata
from tests.support.layered_bucket import make_chain, make_layer, release, scope_of
from tests.support.running_api import Api

pytestmark = pytest.mark.counts_nothing


def template_on(build_id: str, tenant: str, layers: list[LayerRecord]) -> TemplateMetadata:
    told = metadata(build_id, tenant=tenant)
    rootfs = told.artifacts[ArtifactName.ROOTFS]
    on_layers = rootfs.model_copy(update={"layers": tuple(each.reference for each in layers)})
    artifacts = {**told.artifacts, ArtifactName.ROOTFS: on_layers}
    return told.model_copy(update={"artifacts": artifacts})


def size_of(layer: LayerRecord) -> int:
    return sum(stored.size_bytes for stored in layer.objects.values())


def test_it_tells_what_is_shared_and_nothing_of_other_tenants(empty_bucket: Bucket) -> None:
    layers, mine, sibling, other = (
        LayerObjects(empty_bucket),
        scope_of(tenant="acme"),
        scope_of(tenant="acme"),
        scope_of(tenant="beta"),
    )
    base = make_layer(empty_bucket, mine, "base", owner=EVERYBODY)
    step = make_layer(empty_bucket, mine, "step", (base.reference,))
    last = make_layer(empty_bucket, mine, "last", (base.reference, step.reference))
    for scope in (sibling, other):
        layers.refer(base.layer_id, scope)
    chain = [base, step, last]
    own = sum(each.size_bytes for each in metadata(mine.build_id).objects())

    alone = inspect_template(empty_bucket, template_on(mine.build_id, "acme", chain))
    assert [each.builds for each in alone.layers] == [(sibling.build_id,), (), ()]
    assert [each.is_everybodys for each in alone.layers] == [True, False, False]
    assert [each.is_freed for each in alone.layers] == [False, True, True]
    assert [each.stored_bytes for each in alone.layers] == [size_of(each) for each in chain]
    assert alone.own_bytes == own
    assert alone.freed_bytes == own + size_of(step) + size_of(last)

    layers.refer(step.layer_id, sibling)
    shared = inspect_template(empty_bucket, template_on(mine.build_id, "acme", chain))
    assert [each.is_freed for each in shared.layers] == [False, False, True]
    assert [each.builds for each in shared.layers] == [(sibling.build_id,)] * 2 + [()]


def test_nothing_tells_how_many_others_need_a_layer_of_a_public_image(
    empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MOST_USERS", 3)
    layers, mine = LayerObjects(empty_bucket), scope_of(tenant="acme")
    base = make_layer(empty_bucket, mine, "base", owner=EVERYBODY)
    template = template_on(mine.build_id, "acme", [base])
    alone = inspect_template(empty_bucket, template)
    for _ in range(4):
        layers.refer(base.layer_id, scope_of(tenant="beta"))
    assert inspect_template(empty_bucket, template) == alone
    siblings = [scope_of(tenant="acme") for _ in range(3)]
    for scope in siblings:
        layers.refer(base.layer_id, scope)
    [shared] = inspect_template(empty_bucket, template).layers
    assert shared.has_more
    assert set(shared.builds) <= {scope.build_id for scope in siblings}


def test_what_it_says_a_delete_frees_is_what_goes(empty_bucket: Bucket) -> None:
    scope = scope_of(tenant="acme")
    chain = make_chain(empty_bucket, scope, "base", "step", "last")
    cached = scope_of(tenant="acme")
    make_layer(empty_bucket, cached, "another", (chain[0].reference,))
    release(LayerObjects(empty_bucket), cached.build_id)
    found = inspect_template(empty_bucket, template_on(scope.build_id, "acme", chain))
    release(LayerObjects(empty_bucket), scope.build_id, collect=True)
    gone = [LayerObjects(empty_bucket).read(each.layer_id) is None for each in chain]
    assert [each.is_freed for each in found.layers] == gone == [False, True, True]


def test_a_template_without_layers_has_its_own_objects_alone(empty_bucket: Bucket) -> None:
    told = metadata(str(uuid.uuid4()))
    found = inspect_template(empty_bucket, told)
    assert found.layers == ()
    assert found.freed_bytes == sum(each.size_bytes for each in told.objects())


async def test_the_command_shows_it(api: Api, empty_bucket: Bucket) -> None:
    scope = scope_of(tenant="default")
    [layer] = make_chain(empty_bucket, scope, "base", owner="default")
    told = template_on(scope.build_id, "default", [layer])
    empty_bucket.write_object(metadata_name(scope.build_id), told.to_json().encode())
    env = {"TEMPLATE_MANAGER_API_ADDRESS": api.server.address}
    ended = await cli("inspect", scope.build_id, env=env)
    assert ended.code == 0, ended.err
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert [line[0] for line in lines] == [layer.layer_id, scope.build_id]
    assert lines[0][2:4] == ["the tenant's", "frees it"]
    as_json = (await cli("inspect", scope.build_id, "--json", env=env)).json
    assert as_json["layers"][0]["layer_id"] == layer.layer_id
    assert as_json["freed_bytes"] == as_json["own_bytes"] + size_of(layer)
    missing = await cli("inspect", str(uuid.uuid4()), env=env)
    assert missing.code == 2
