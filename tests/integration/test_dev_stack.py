"""The dev stack is stopped while a build is at work, and started again."""

from __future__ import annotations

from pathlib import Path

import images
import pytest
from devstack.services import print_progress
from devstack.stack import APPS, Stack

from tests.support.host_resources import HostResources
from tests.support.image_builders import forget_images
from tests.support.local_http import HTTPD
from tests.support.real_stack import PARTS, Product

pytestmark = pytest.mark.counts_host


def test_a_build_goes_on_after_the_stack_was_down(tmp_path: Path) -> None:
    def stack() -> Stack:
        return Stack(only=PARTS, apps=APPS, directory=tmp_path)

    data_dir = tmp_path / "data"
    with stack() as running:
        product = Product(running)
        image = images.make_and_push("busybox", product.registry, print_progress)
        before = HostResources.count(data_dir)
        build_id = product.build(image, start=HTTPD, ready="sleep 8")
        product.until_logged(build_id, "guest is up")
    now = HostResources.count(data_dir)
    assert (now.processes, now.networks) == (before.processes, before.networks)
    with stack() as running:
        product = Product(running)
        assert product.ended(build_id, 200)["state"] == "completed"
        product.require_template(build_id)
        forget_images(product.registry)
    before.assert_unchanged(data_dir)
