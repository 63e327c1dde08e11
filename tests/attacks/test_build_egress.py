"""Builds by the API whose steps use the internet, on a host from which nothing leads anywhere else.

The host's process, and so what leads its guests out, works in a network namespace whose one wire
ends in the test's own. What it needs of the service answers at ports of its loopback.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import images
import pytest
from devstack.inner_internet import (
    DOCKER_BRIDGE,
    HOST_ADDRESS,
    METADATA,
    NAME,
    OTHER_PUBLIC,
    PRIVATE,
    PUBLIC,
    RESOLVER,
    InnerInternet,
    inner_internet,
)
from steps_bench import WHEEL, make_files

from api.pb import template_manager_pb2 as pb
from tests.support.real_stack import Product, nothing_left, running_product

pytestmark = [
    pytest.mark.counts_host,
    pytest.mark.whole,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("undisturbed"),
]

INSIDE = (METADATA, *PRIVATE, HOST_ADDRESS, DOCKER_BRIDGE, "10.0.2.2", "127.0.0.1", "169.254.0.22")
LINK = f'<a href="/files/{WHEEL}#sha256={{}}">{WHEEL}</a>'
# pip is run out of its wheel: to make an environment for it takes a guest very long here.
PIP = (
    "PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) python3 -m pip install --target /made "
    f"--no-compile --index-url http://{NAME}/simple/ --trusted-host {NAME} measured && "
    "PYTHONPATH=/made python3 -c 'import measured'"
)
# Fails if it reaches one of its arguments, and tells why each of the others is not reached.
TRY = """python3 -c '
import socket, sys
def reached(address):
    try:
        with socket.create_connection((address, 80), timeout=3) as one:
            one.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            return one.recv(100)
    except OSError as error:
        print(address, error)
sys.exit(", ".join(each for each in sys.argv[1:] if reached(each)) or 0)
' """


@pytest.fixture(scope="module")
def product() -> Iterator[Product]:
    with running_product() as running:
        yield running


@pytest.fixture(scope="module")
def base(product: Product) -> Iterator[str]:
    """A template with Python, which is all that the host needs for a build."""
    image = images.make_and_push("python", product.registry, lambda _: None)
    build_id = product.build(image, "--disk", "512", start="", ready="")
    assert product.ended(build_id, 400)["state"] == "completed"
    yield build_id
    assert product.cli("delete", build_id).code == 0


@pytest.fixture
def internet(product: Product, base: str, tmp_path: Path) -> Iterator[InnerInternet]:
    """What there is in the place of the internet, while the host works in it."""
    place = tmp_path / "internet"
    place.mkdir()
    ports = product.stack.environment.ports
    with (
        nothing_left(product),
        inner_internet(place) as inner,
        inner.lending(ports.temporal, ports.gcs),
    ):
        product.stack.stop("host")
        inner.from_host(lambda: product.stack.start_app("host"))
        try:
            yield inner
        finally:
            product.stack.restart("host")


def test_pip_installs_in_a_build_that_may_reach_its_index_alone(
    product: Product, base: str, internet: InnerInternet, tmp_path: Path
) -> None:
    make_files(tmp_path, 1)
    wheel = (tmp_path / WHEEL).read_bytes()
    internet.pages["/simple/measured/"] = LINK.format(hashlib.sha256(wheel).hexdigest()).encode()
    internet.pages[f"/files/{WHEEL}"] = wheel
    network = pb.TemplateNetwork(access=pb.AllowedOnly, allowed=[NAME])
    command = f"{PIP} && {TRY} {' '.join((OTHER_PUBLIC, *INSIDE))}"
    log = built(product, base, network, command)
    assert "Successfully installed measured-1.0" in log
    assert f"network of the steps: only {NAME}" in log
    assert set(internet.reached) == {PUBLIC}
    assert internet.seen == {PUBLIC, RESOLVER}


def test_a_build_with_the_internet_reaches_nothing_of_the_inside(
    product: Product, base: str, internet: InnerInternet
) -> None:
    network = pb.TemplateNetwork(access=pb.Internet)
    command = f"{{ ! {TRY} {OTHER_PUBLIC}; }} && {TRY} {' '.join(INSIDE)}"
    log = built(product, base, network, command)
    assert "network of the steps: internet" in log
    assert internet.reached == [OTHER_PUBLIC]
    assert internet.seen == {OTHER_PUBLIC}


def built(product: Product, base: str, network: pb.TemplateNetwork, command: str) -> list[str]:
    """Build on the template by the API, and delete what comes out; returns the log."""
    template = pb.TemplateConfig(
        template_id="egress",
        build_id=str(uuid.uuid4()),
        from_template=pb.FromTemplateConfig(build_id=base),
        steps=[pb.TemplateStep(type="RUN", args=[command])],
        memory_mb=256,
        vcpu_count=1,
        disk_size_mb=256,
        network=network,
    )
    build_id = product.create(template, {})
    status = product.ended(build_id, 600)
    log = product.log(build_id)
    assert status["state"] == "completed", [status, *log[-30:]]
    assert product.cli("delete", build_id).code == 0
    return log
