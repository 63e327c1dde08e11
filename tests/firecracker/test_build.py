"""One whole build on real Firecracker, through the command line: to an HTTP answer, and deleted.

In the jailer, where JAILER_BINARY names one.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from devstack.given_firecracker import SLOW_SECONDS
from devstack.registry import Layer, Registry

from activities.microvm.network import in_network
from tests.support.local_http import HTTPD, get_page
from tests.support.real_firecracker import (
    IMAGE_CONFIG,
    MEMORY_MB,
    RealFirecracker,
)
from tests.support.real_stack import Product, nothing_left, running_product


@pytest.fixture
def product(firecracker: RealFirecracker, tmp_path: Path) -> Iterator[Product]:
    settings = firecracker.settings(tmp_path)
    with running_product(**{f"TEMPLATE_MANAGER_{k}": v for k, v in settings.items()}) as running:
        yield running


def test_from_an_image_to_an_answer_and_gone_again(
    product: Product, firecracker: RealFirecracker, tmp_path: Path
) -> None:
    layer = Layer().directory("bin").busybox().directory("srv").add("srv/index.html", b"hello\n")
    registry = Registry(product.registry, log=tmp_path, directory=tmp_path)
    registry.push("real", [layer.tar()], config=IMAGE_CONFIG)
    with nothing_left(product):
        build_id = product.build(
            f"{product.registry}/real:latest",
            *("--memory", str(MEMORY_MB), "--ready-timeout", str(int(SLOW_SECONDS))),
            start=HTTPD,
            ready="",  # each of its attempts has 30 s, which are few where a process takes seconds
        )
        status = product.ended(build_id, 2 * SLOW_SECONDS)
        assert status["state"] == "completed", status["reason"]
        template = tmp_path / "template"
        assert product.cli("pull", build_id, str(template)).code == 0
        _require_traits(template, firecracker)
        _require_served_page(product, template)
        assert product.cli("delete", build_id).code == 0
        assert product.objects(build_id) == []


def _require_traits(template: Path, firecracker: RealFirecracker) -> None:
    """By what it can be resumed, a number for the format and not the stand-in's; what held it."""
    metadata = json.loads((template / "metadata.json").read_text())
    vmm, facts = metadata["vmm"], metadata["snapshot_facts"]
    assert "qemu" not in vmm["version"]
    assert vmm["snapshot_format"].replace(".", "").isdigit(), vmm
    # A release of one number has both programs.
    assert facts["jailer"] == (vmm["version"] if firecracker.jailer else "none")
    assert facts["seccomp"] in ("none", "filter")


def _require_served_page(product: Product, template: Path) -> None:
    with product.started("run", str(template), "--json") as process:
        assert process.stdout is not None
        told = json.loads("".join(process.stdout.readline() for _ in range(5)))
        assert in_network(told["network"], lambda: get_page(SLOW_SECONDS)).endswith(b"hello\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
