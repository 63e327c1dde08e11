"""Kills, cancels, deletes and resets at each point of a layer that goes up beside the steps."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Callable

import pytest

from activities.contract.names import ArtifactName, build_workflow_id
from activities.store.bucket import Bucket
from activities.store.layers import LayerObjects
from activities.store.objects import (
    ObjectKind,
    artifact_name,
    header_name,
    is_layer_id,
    layer_parts_prefix,
    parse_object_name,
)
from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb
from tests.support.chaos import STEPS, ChaosProduct
from tests.support.real_stack import nothing_left
from tests.support.resetting import reset_before

pytestmark = [pytest.mark.timeout(400), pytest.mark.full]

STEP = pb.TemplateStep(
    type="RUN", args=["dd if=/dev/urandom of=/made bs=1048576 count=12 2>/dev/null; sync"]
)
NEXT = pb.TemplateStep(type="RUN", args=["sleep 8; echo $CASE >/case"])


def kill(process: str) -> Callable[[ChaosProduct, str], None]:
    def act(product: ChaosProduct, _: str) -> None:
        product.kill(process)
        product.bring_back(process)

    return act


def call(name: str) -> Callable[[ChaosProduct, str], None]:
    def act(product: ChaosProduct, build_id: str) -> None:
        async def ask() -> None:
            async with TemplateClient(
                product.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]
            ) as client:
                await (client.cancel if name == "cancel" else client.delete)(build_id)

        asyncio.run(ask())

    return act


def reset(product: ChaosProduct, build_id: str) -> None:
    async def ask() -> None:
        client = await product.temporal()
        await reset_before(client, build_workflow_id(build_id), STEPS["sending"])

    asyncio.run(ask())


SLOW = {"kind": "slow", "operation": "(upload|compose)", "delay": 1, "count": None}
"""Each point lasts so long. What is on its way arrives even after its sender has died."""
ACTS = {
    "host": kill("host"),
    "worker": kill("worker"),
    "cancel": call("cancel"),
    "delete": call("delete"),
    "reset": reset,
}
UNDONE = ("cancel", "delete")
HITS = {
    "parts": ("host", "cancel"),
    "data": ("host", "delete", "reset"),
    "header": ("host", "worker", "cancel", "reset"),
}
"""What happens when so much of a layer is in the bucket, and nothing that comes after it."""


@pytest.mark.parametrize(
    ("point", "act"), [(point, act) for point, acts in HITS.items() for act in acts]
)
def test_a_layer_is_whole_or_made_anew(product: ChaosProduct, point: str, act: str) -> None:
    """And whole means byte for byte: a template on it is what the host has."""
    case = str(uuid.uuid4())
    with nothing_left(product):
        build_id = product.build_with_steps(STEP, NEXT, case=case)
        assert product.hit(build_id, "sending", lambda: act_at(product, build_id, point, ACTS[act]))
        if act in UNDONE:
            require_undone(product, build_id, act)
            build_id = product.build_with_steps(STEP, NEXT, case=case)
        status = product.ended_somehow(build_id)
        assert status["state"] == "completed", status
        product.require_template(build_id)
        require_whole_layers(product.bucket)
        assert product.cli("delete", build_id).code == 0
    require_whole_layers(product.bucket)


def act_at(
    product: ChaosProduct, build_id: str, point: str, act: Callable[[ChaosProduct, str], None]
) -> None:
    """Act when a layer has come to that point: a build sends three, one after the other."""
    bucket, deadline = product.bucket, time.monotonic() + 120
    with product.stack.faults(SLOW):
        while point_of(bucket, build_id) != point:
            assert time.monotonic() < deadline, point
            time.sleep(0.02)
        act(product, build_id)


def point_of(bucket: Bucket, build_id: str) -> str:
    """Return how far the layer is that a build is at, or ''."""
    layers = LayerObjects(bucket)
    for use in layers.uses(build_id):
        named = parse_object_name(use.name)
        assert named is not None
        layer = named.layer_id
        if layers.read(layer) is None and (point := _point_of_layer(bucket, build_id, layer)):
            return point
    return ""


def _point_of_layer(bucket: Bucket, build_id: str, layer: str) -> str:
    # In the order in which they come: what is missing at the first look may be there at the next.
    if not bucket.has_any(layer_parts_prefix(build_id, layer)):
        has_data = bucket.stat_object(artifact_name(layer, ArtifactName.ROOTFS))
        has_header = bucket.stat_object(header_name(layer, ArtifactName.ROOTFS))
        return "header" if has_header else "data" if has_data else ""
    return "" if bucket.stat_object(artifact_name(layer, ArtifactName.ROOTFS)) else "parts"


def require_undone(product: ChaosProduct, build_id: str, act: str) -> None:
    """Nothing names the build any more, and it has begun no layer that it has not finished."""
    if act == "cancel":
        assert product.status(build_id)["state"] == "cancelled"
    assert product.objects(f"{build_id}/") == []
    require_whole_layers(product.bucket)
    if act == "cancel":
        assert product.cli("delete", build_id).code == 0


def require_whole_layers(bucket: Bucket) -> None:
    """Each layer has its objects, and what refers to it is a layer that is there."""
    objects: dict[str, set[str]] = defaultdict(set)
    users: set[str] = set()
    for stored in bucket.list_objects(""):
        named = parse_object_name(stored.name)
        assert named is not None, stored.name
        if named.kind is ObjectKind.LAYER:
            objects[named.layer_id].add(stored.name)
        elif named.kind is ObjectKind.REFERENCE and is_layer_id(named.build_id):
            users.add(named.build_id)
    for layer, names in objects.items():
        record = LayerObjects(bucket).read(layer)
        assert record is not None, names
        assert {each.name for each in record.objects.values()} < names
        assert len(names) == 3, names
    assert users <= set(objects)
