"""A host's memory stays bounded, whatever images, steps and guests say to it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from devstack.environment import FIRECRACKER_VERSION, REPOSITORY
from devstack.registry import Layer, Registry, running_registry

from activities.contract.units import MIB
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from tests.support.real_stack import Product, nothing_left, running_product
from tests.support.standin_vmm import FAILURE, GUESTS

pytestmark = pytest.mark.counts_host

VMM = REPOSITORY / "tests" / "support" / "standin_vmm.py"
SLOTS = 2
GROWTH = 1.2
CALL_SECONDS = 60
LARGE_BYTES = 200 * MIB
# How a RUN ends; what it says on the way is one of the guests.
STEPS = {"nothing": ":", "a failure": FAILURE.decode()}
LARGE_EVERY = 10


class Builds:
    """Builds of hostile images by one host."""

    def __init__(self, product: Product, registry: Registry) -> None:
        self._product = product
        self._registry = registry
        self._pid = product.stack.pid("host")
        address = product.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]
        self._api = pb_grpc.TemplateServiceStub(grpc.insecure_channel(address))

    def run(self, numbers: range) -> int:
        """Run these builds, as many at once as the host has slots.

        Returns what the host's process has resident of its own then, in bytes.
        """
        with ThreadPoolExecutor(SLOTS) as threads:
            for _ in threads.map(self._run, numbers):
                print(self._resident_bytes() // MIB, end=" ", flush=True)
        return self._resident_bytes()

    def _resident_bytes(self) -> int:
        assert self._product.stack.pid("host") == self._pid, "the host was started anew"
        rollup = Path(f"/proc/{self._pid}/smaps_rollup").read_text()
        return int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0]) * 1024

    def _run(self, number: int) -> None:
        build_id = str(uuid.uuid4())
        said = list(STEPS)[number % len(STEPS)]
        request = pb.TemplateCreateRequest(template=self._config(number, build_id, STEPS[said]))
        self._api.TemplateCreate(request, timeout=CALL_SECONDS)
        status = self._product.ended(build_id, 180)
        wanted = ("failed", "ImageStepError") if said == "a failure" else ("completed", None)
        assert (status["state"], (status["reason"] or {}).get("error_type")) == wanted, status[
            "reason"
        ]
        delete = pb.TemplateBuildDeleteRequest(template_id="hostile", build_id=build_id)
        self._api.TemplateBuildDelete(delete, timeout=CALL_SECONDS)

    def _config(self, number: int, build_id: str, command: str) -> pb.TemplateConfig:
        image = "large" if number % LARGE_EVERY == LARGE_EVERY - 1 else "small"
        return pb.TemplateConfig(
            template_id="hostile",
            build_id=build_id,
            from_image=f"{self._registry.address}/{image}:latest",
            memory_mb=256,
            vcpu_count=1,
            disk_size_mb=16,
            kernel_version=list(GUESTS)[number // 2 % len(GUESTS)],
            firecracker_version=FIRECRACKER_VERSION,
            start_command="serve",
            force=True,
            steps=[pb.TemplateStep(type="RUN", args=[command])],
        )


@contextmanager
def hostile_host(place: Path, registry: Registry) -> Iterator[Product]:
    """Run the product with a stand-in for Firecracker."""
    vmm = place / "firecracker" / FIRECRACKER_VERSION / "firecracker"
    vmm.parent.mkdir(parents=True)
    # Its user may enter neither this repository nor the environment of this Python.
    vmm.write_text("#!/usr/bin/env -S python3 -I -S\n" + VMM.read_text())
    vmm.chmod(0o755)
    for guest in GUESTS:
        (place / "kernels" / guest).mkdir(parents=True)
        (place / "kernels" / guest / "vmlinux.bin").write_text(guest)
    with running_product(
        TEMPLATE_MANAGER_FIRECRACKER_DIR=str(place / "firecracker"),
        TEMPLATE_MANAGER_KERNELS_DIR=str(place / "kernels"),
        TEMPLATE_MANAGER_HOST_SLOTS=str(SLOTS),
        TEMPLATE_MANAGER_CHECKPOINT_MAX_MB="500",
        TEMPLATE_MANAGER_SWEEP_INTERVAL_SECONDS="20",
    ) as product:
        yield product


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    (tmp_path / "registry").mkdir()
    with running_registry(tmp_path / "registry") as registry:
        layer = Layer().directory("bin").busybox().directory("etc").directory("tmp", 0o1777)
        for name in ("sh", "head", "tr", "yes", "printf", "cat"):
            layer.symlink(f"bin/{name}", "busybox")
        base = layer.tar()
        registry.push("small", [base])
        large = Layer().directory("data")
        large.add("data/blob", bytes(range(256)) * (LARGE_BYTES // 256))
        accounts = b"".join(b"u%d:x:%d:%d::/:/bin/sh\n" % (n, n, n) for n in range(100_000))
        large.add("etc/passwd", accounts + b"root:x:0:0:root:/root:" + b"x" * (8 * MIB) + b"\n")
        registry.push("large", [base, large.tar()])
        with hostile_host(tmp_path, registry) as product, nothing_left(product):
            yield Builds(product, registry)


@pytest.mark.parametrize(
    ("first", "all_builds"),
    [
        pytest.param(5, 20, marks=pytest.mark.timeout(1200)),
        pytest.param(10, 100, marks=[pytest.mark.whole, pytest.mark.timeout(3600)]),
    ],
)
def test_a_hosts_memory_does_not_grow_with_builds(
    builds: Builds, first: int, all_builds: int
) -> None:
    early = builds.run(range(first))
    late = builds.run(range(first, all_builds))
    told = f"{early // MIB} MiB after {first} builds, {late // MIB} MiB after {all_builds}"
    print(told)
    assert late <= early * GROWTH, told
