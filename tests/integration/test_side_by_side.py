"""Processes of an earlier version beside those of the present one, while a fleet is upgraded.

Each of two APIs is asked for builds, workers of both share them, and a host of each has some.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import images
import pytest
from devstack.ports import free_port

from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb
from tests.support.earlier_code import EarlierCode, earlier_code, upgrade_from
from tests.support.local_http import HTTPD, HTTPD_ANSWERS
from tests.support.real_stack import Product, nothing_left, running_product

pytestmark = [pytest.mark.counts_host, pytest.mark.whole, pytest.mark.timeout(1200)]

BUILDS_OF_EACH = 2
SECONDS = 600
TRIES = 10


def start_earlier(product: Product, code: EarlierCode, app: str, **env: str) -> str:
    """Start a process of the earlier code beside the one of the present; returns its name."""
    name = f"{app}-earlier"
    product.stack.start_app(app, name, program=code.program, **code.variables, **env)
    return name


def create(address: str, image: str) -> str:
    """Start a build of its own by the API at an address."""
    template = pb.TemplateConfig(
        template_id="web",
        build_id=str(uuid.uuid4()),
        from_image=image,
        memory_mb=256,
        vcpu_count=1,
        disk_size_mb=64,
        start_command=HTTPD,
        ready_command=HTTPD_ANSWERS,
    )
    template.env["CASE"] = template.build_id

    async def ask() -> str:
        async with TemplateClient(address) as client:
            return (await client.create(template)).build_id

    return asyncio.run(ask())


def completed(product: Product, build: str, again: Callable[[], str]) -> dict[str, Any]:
    """Return the status of a build when it is completed.

    A guest that is emulated may answer so late on a busy machine that its clock looks wrong, and
    its snapshot is kept: such a build is made anew.
    """
    for _ in range(TRIES):
        status = product.ended(build, SECONDS)
        if status["state"] == "completed":
            return status
        assert status["reason"]["error_type"] == "SnapshotNotResumableError", status["reason"]
        assert product.cli("delete", build).code == 0
        build = again()
    raise AssertionError(status["reason"])


def test_earlier_and_present_processes_complete_builds_together() -> None:
    with (
        earlier_code(upgrade_from()) as code,
        running_product((), TEMPLATE_MANAGER_HOST_SLOTS="1") as product,
    ):
        image = images.make_and_push("alpine-like", product.registry, lambda _: None)
        earlier_address = f"127.0.0.1:{free_port()}"
        start_earlier(product, code, "api", TEMPLATE_MANAGER_API_ADDRESS=earlier_address)
        start_earlier(product, code, "worker")
        product.stack.start_app("api")
        product.stack.start_app("worker")
        address = product.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]
        apis = (earlier_address, address)
        earlier_data = product.stack.environment.state_dir / "data-host-earlier"
        with nothing_left(product, product.data_dir, earlier_data):
            asked = [partial(create, api, image) for api in apis for _ in range(BUILDS_OF_EACH)]
            builds = [ask() for ask in asked]
            # Its one slot leaves most builds to the other one.
            earlier_host = start_earlier(product, code, "host")
            product.stack.start_app("host")
            ended = [completed(product, *each) for each in zip(builds, asked, strict=True)]
            assert earlier_host in {status["host"] for status in ended}
            assert len({status["host"] for status in ended}) == 2
            for build in [status["build_id"] for status in ended]:
                with tempfile.TemporaryDirectory() as place:
                    assert product.cli("pull", build, place).code == 0
                assert product.cli("delete", build).code == 0
