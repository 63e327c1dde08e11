"""From an image in a registry to a template that resumes: the product as its users run it."""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import docker
import images
import pytest
import requests
from devstack.environment import REPOSITORY
from devstack.ports import free_port
from devstack.registry import Layer, Registry

from activities.contract.names import Step
from activities.contract.units import MIB
from activities.microvm.network import in_network
from api.pb import template_manager_pb2 as pb
from tests.support.copied_files import tar_of_files
from tests.support.file_trees import difference, tree_of_ext4, tree_of_image
from tests.support.local_http import HTTPD, HTTPD_ANSWERS, get_page
from tests.support.otlp_collector import running_collector
from tests.support.pushed_images import tags_of
from tests.support.real_stack import Product, nothing_left, running_product
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.counts_host

# A host that is restarted lets its steps go on for 10 s, and must be back within the grace.
OPTIONS = (
    '{"heartbeat_timeout_seconds": 4, "lease_grace_seconds": 20, "retry_attempts": 2, '
    '"retry_initial_seconds": 0.5, "retry_maximum_seconds": 1}'
)
STEPS = [str(step) for step in Step]
# What a booted system writes by itself.
WRITTEN_BY_SYSTEMD = re.compile(
    r"/(etc(/(machine-id|\.updated|\.pwd\.lock|resolv\.conf))?|var/(\.updated)?|var/(log|lib|cache|tmp)\b.*"
    r"|tmp\b.*|root|srv|run|dev|boot|home|mnt|media|opt|proc|sys)?"
)
WRITTEN_BY_BUSYBOX = re.compile(r"/(tmp|run|dev|proc|sys|etc|srv|var(/.*)?)?")


@pytest.fixture(scope="module")
def product() -> Iterator[Product]:
    metrics, health = [free_port(), free_port()], [free_port(), free_port()]
    with (
        running_collector() as collector,
        running_product(
            ("api",),
            TEMPLATE_MANAGER_BUILD=OPTIONS,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.address,
            OTEL_BSP_SCHEDULE_DELAY="200",
        ) as running,
    ):
        running.collector = collector
        for app, metrics_port, health_port in zip(("worker", "host"), metrics, health, strict=True):
            running.stack.start_app(
                app,
                TEMPLATE_MANAGER_METRICS_ADDRESS=f"127.0.0.1:{metrics_port}",
                TEMPLATE_MANAGER_HEALTH_ADDRESS=f"127.0.0.1:{health_port}",
            )
            running.metrics.append(f"http://127.0.0.1:{metrics_port}/metrics")
            running.health.append(f"127.0.0.1:{health_port}")
        yield running


@pytest.fixture
def busybox(product: Product) -> str:
    return images.make_and_push("busybox", product.registry, lambda _: None)


@pytest.mark.parametrize(
    ("name", "written", "vcpus"),
    [
        ("busybox", WRITTEN_BY_BUSYBOX, 1),
        ("alpine-like", WRITTEN_BY_BUSYBOX, 1),
        ("debian", WRITTEN_BY_SYSTEMD, 2),
    ],
    ids=["busybox", "alpine-like", "debian"],
)
def test_an_image_becomes_a_template_that_resumes(
    product: Product, name: str, written: re.Pattern[str], vcpus: int, tmp_path: Path
) -> None:
    image = images.make_and_push(name, product.registry, lambda _: None)
    with nothing_left(product):
        build_id = product.build(
            *(image, "--force"),  # another test may have built the same
            *("--vcpu", str(vcpus), "--name", f"site_{name}", "--tag", "stable"),
            ready=f'[ "$(nproc)" = {vcpus} ] && {HTTPD_ANSWERS}',
        )
        status = product.ended(build_id, 200)
        assert status["state"] == "completed", status
        assert status["image_digest"].startswith("sha256:")
        steps = [row["step"] for row in status["timeline"]]
        assert steps == STEPS
        pulled = product.cli("pull", f"site_{name}:stable", str(tmp_path / "template"))
        assert pulled.code == 0, pulled.err
        _require_same_files(product, image, tmp_path, written)
        is_fetched = name == "alpine-like"
        template = f"site_{name}:stable" if is_fetched else str(tmp_path / "template")
        _require_served_page(product, template, name)
        if name == "busybox":  # the same for all, and it takes a while
            _require_killed_run_is_swept(product, tmp_path / "template")
            _require_damage_is_told(product, tmp_path / "template")
        log = product.log(build_id)
        assert "guest is ready" in log
        assert product.objects(build_id)
        deleted = product.cli("delete", f"site_{name}:stable")
        assert (deleted.code, f"with site_{name}:stable, site_{name}" in deleted.out) == (0, True)
        assert product.cli("delete", build_id).code == 0  # twice is fine
        assert product.cli("status", build_id).code == 2


def _require_same_files(
    product: Product, image: str, tmp_path: Path, written: re.Pattern[str]
) -> None:
    client = docker.from_env().api
    expected = tree_of_image(client, image, tmp_path / "image")
    all_made = (product.data_dir / "steps" / "build_rootfs").glob("*/rootfs.ext4")
    made = max(all_made, key=lambda path: path.stat().st_mtime)
    before_the_boot = tree_of_ext4(made, tmp_path / "made")
    assert difference(expected, before_the_boot) == {}
    template = tree_of_ext4(tmp_path / "template" / "rootfs.ext4", tmp_path / "pulled")
    changed = difference(before_the_boot, template)
    assert [path for path in changed if not written.fullmatch(path)] == []


def _require_served_page(product: Product, template: str, name: str) -> None:
    """`template-manager run` resumes it here, and the image's server answers."""
    with product.started("run", template, "--json") as process:
        assert process.stdout is not None
        told = json.loads("".join(process.stdout.readline() for _ in range(5)))
        assert told["resume_ms"] > 0
        page = in_network(told["network"], lambda: get_page(30)).decode()
        assert f"Hello from {name}" in page
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def _require_damage_is_told(product: Product, template: Path) -> None:
    """A file of the right size that is not what was built is to be pulled again."""
    with (template / "rootfs.ext4").open("r+b") as disk:
        _flip_a_bit(disk)
        ended = product.cli("run", str(template))
        assert (ended.code, ended.out) == (1, "")
        assert "rootfs.ext4 is not what was built" in ended.err
        _flip_a_bit(disk)
    snapfile = template / "snapfile"
    snapfile.write_bytes(bytes(snapfile.stat().st_size))
    for options in ((), ("--no-check",)):  # what does not resume is looked at in any case
        ended = product.cli("run", str(template), *options)
        assert (ended.code, ended.out) == (1, "")
        assert "snapfile is not what was built" in ended.err
        assert "→ Pull it again: template-manager pull" in ended.err


def _flip_a_bit(disk: BinaryIO) -> None:
    disk.seek(20 * MIB)
    byte = disk.read(1)[0]
    disk.seek(20 * MIB)
    disk.write(bytes([byte ^ 1]))
    disk.flush()


def _require_killed_run_is_swept(product: Product, template: Path) -> None:
    """What it could not remove itself: the VM with its copy of the disk, and its network."""
    with product.started("run", str(template), "--json", "--no-check") as process:
        assert process.stdout is not None
        told = json.loads("".join(process.stdout.readline() for _ in range(5)))
        process.kill()
        process.wait(20)
    assert (product.data_dir / "vms" / told["network"] / "fc-vm" / "rootfs.ext4").exists()
    swept = product.cli("sweep", "--json")
    assert swept.code == 0, swept.err
    # The host sweeps now and then as well: each of the two may have been quicker at both of
    # them or at one, and may be at it still.
    kinds = {item["kind"] for item in swept.json["items"] if item["name"] == told["network"]}
    assert kinds <= {"VM", "netns"}
    deadline = time.monotonic() + 20
    while left := [path for path in _places_of_run(product, told["network"]) if path.exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _places_of_run(product: Product, network: str) -> list[Path]:
    return [product.data_dir / "vms" / network, Path("/run/netns") / network]


def _require_failure(
    product: Product, build_id: str, error_type: str, *told: str, seconds: float = 60
) -> None:
    """It fails in time, says why and what to do next, and leaves nothing."""
    began = time.monotonic()
    status = product.ended(build_id, seconds)
    assert time.monotonic() - began < seconds
    assert status["state"] == "failed"
    assert status["reason"]["error_type"] == error_type
    shown = product.cli("status", build_id)
    for text in (error_type, "→ ", *told):
        assert text in shown.out, shown.out
    assert product.objects(build_id) == []
    assert product.cli("delete", build_id).code == 0


def test_a_wrong_start_command(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(busybox, start="/no/such/server --port 80")
        _require_failure(product, build_id, "StartCommandError", "exit code 127", "/no/such/server")


def test_a_ready_command_that_never_succeeds(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(
            busybox, "--ready-timeout", "15", ready="echo not yet; /bin/busybox false"
        )
        _require_failure(product, build_id, "ReadyTimeoutError", "within 15 s", "not yet")


def test_a_missing_image(product: Product) -> None:
    with nothing_left(product):
        build_id = product.build(f"{product.registry}/no/such:image")
        _require_failure(product, build_id, "ImageNotFoundError", "no/such:image", seconds=20)


def test_an_unreachable_registry(product: Product) -> None:
    with nothing_left(product):
        build_id = product.build(f"127.0.0.1:{free_port()}/web:1")
        _require_failure(product, build_id, "RegistryUnavailableError", "refused", seconds=30)


def test_another_architecture(product: Product) -> None:
    registry = Registry(product.registry, Path(), Path())
    registry.push("foreign", [Layer().busybox().tar()], architecture="arm64")
    with nothing_left(product):
        build_id = product.build(f"{product.registry}/foreign:latest")
        _require_failure(product, build_id, "WrongArchitectureError", "arm64", seconds=20)


def test_a_kernel_that_the_host_lacks(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(busybox, "--kernel", "vmlinux-0.0.1")
        _require_failure(product, build_id, "KernelMissingError", "vmlinux-0.0.1/vmlinux.bin")


def test_a_full_disk(product: Product, busybox: str, tmp_path: Path) -> None:
    """A host whose data directory is a small file system of its own."""
    with small_disk(tmp_path, 100) as data, product.only_host_on(data):
        (data / "ballast").write_bytes(bytes(40 << 20))
        with nothing_left(product, data):
            build_id = product.build(busybox, "--memory", "512")
            _require_failure(product, build_id, "HostDiskFullError", "Free space on the host")


def test_cancel_in_the_middle_of_a_boot(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(busybox, ready="/bin/busybox false")
        product.until_logged(build_id, "guest is up")
        began = time.monotonic()
        ended = product.cli("cancel", build_id)
        assert ended.code == 0, ended.err
        assert time.monotonic() - began < 10
        assert product.status(build_id)["state"] == "cancelled"
        # The same id can be used again at once.
        again = product.build(busybox, "--build-id", build_id)
        assert again == build_id
        assert product.ended(build_id)["state"] == "completed"
        assert product.cli("delete", build_id).code == 0


def test_a_worker_restart_costs_no_boot(product: Product, busybox: str) -> None:
    with nothing_left(product):
        ready = "/bin/busybox sleep 6"
        build_id = product.build(busybox, "--force", ready=ready)
        product.until_logged(build_id, "guest is up")
        product.stack.kill("host")
        product.stack.restart("host")
        status = product.ended(build_id)
        assert status["state"] == "completed", status
        log = product.log(build_id)
        assert sum(line.startswith("VM started") for line in log) == 1
        assert product.cli("delete", build_id).code == 0


def test_a_second_build_of_the_same_is_quick_and_says_so(product: Product, busybox: str) -> None:
    with nothing_left(product):
        first, second = product.build(busybox), ""
        assert product.ended(first)["state"] == "completed"
        second = product.build(busybox)
        assert product.ended(second)["state"] == "completed"
        status = product.status(second)
        reused = {row["step"] for row in status["timeline"] if row.get("reused")}
        assert {"build_rootfs", "boot_and_snapshot"} <= reused
        for build_id in (first, second):
            assert product.cli("delete", build_id).code == 0


def test_a_password_is_nowhere_but_sealed(product: Product, tmp_path: Path) -> None:
    """Neither in a process's log nor in what Temporal keeps nor in the build's own log."""
    secret = f"hunter2-{uuid.uuid4()}"
    password = tmp_path / "password"
    password.write_text(secret)
    build_id = product.build(
        f"127.0.0.1:{free_port()}/web:1",
        "--registry-user",
        "me",
        "--registry-password-file",
        str(password),
        start=HTTPD,
    )
    product.ended(build_id)
    history = _history(product, build_id)
    assert '"username":"me"' in history  # it is there that one would see it
    logs = [product.stack.log(name) for name in ("api", "worker", "host")]
    for text in (history, *logs, "\n".join(product.log(build_id))):
        assert secret not in text
    assert product.cli("delete", build_id).code == 0


def test_secret_variables_are_nowhere_once_their_steps_have_ended(
    product: Product,
) -> None:
    """Not in a checkpoint, memory or log, deleted blocks included; not in history nor bucket."""
    image = images.make_and_push("alpine-like", product.registry, lambda _: None)
    secret = f"hunter2-{uuid.uuid4()}"
    use = '[ ${#TOKEN} = 44 ] && echo "$TOKEN" && cp /.template/secrets/TOKEN /dev/shm/ && sync'
    template = pb.TemplateConfig(
        template_id="secrets",
        build_id=str(uuid.uuid4()),
        from_image=image,
        steps=[
            pb.TemplateStep(type="RUN", args=[use]),
            pb.TemplateStep(type="RUN", args=["echo $TOKEN | busybox md5sum >/used"]),
        ],
        secret_env={"TOKEN": secret},
        memory_mb=256,
        vcpu_count=1,
        disk_size_mb=32,
        start_command=f"busybox cat /used; echo TOKEN is ${{TOKEN:-unset}}; {HTTPD}",
        ready_command=HTTPD_ANSWERS,
    )
    with nothing_left(product):
        build_id = product.create(template, {})
        assert product.ended(build_id, 200)["state"] == "completed"
        log = product.log(build_id)
        assert {"[secret]", "TOKEN is unset"} <= set(log)
        used = hashlib.md5(f"{secret}\n".encode()).hexdigest()
        assert any(line.startswith(used) for line in log)  # the search can find what is there
        assert _places_of(product, build_id, used.encode())
        assert _places_of(product, build_id, secret.encode()) == []
        assert product.cli("delete", build_id).code == 0


def _places_of(product: Product, build_id: str, text: bytes) -> list[str]:
    """Return where a build or its host has a text: files, objects, history, logs of processes."""
    files = [path for path in product.data_dir.rglob("*") if path.is_file()]
    files += [product.stack.environment.files(app).log for app in ("api", "worker", "host")]
    found = [str(path) for path in files if _has(path, text)]
    for name in product.objects(""):
        data = product.bucket.read_object(name)
        found += [name] if data is not None and text in data[0] else []
    return found + (["history"] if text.decode() in _history(product, build_id) else [])


def _has(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0


def _history(product: Product, build_id: str) -> str:
    """Return the history of a build as it stands in Temporal, and what its payloads are."""
    shown = subprocess.run(
        ["temporal", "workflow", "show", "--output", "json", "-w", f"template-build-{build_id}"],
        env={**os.environ, **product.stack.variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return shown + "".join(_payloads(json.loads(shown)))


def _payloads(part: Any) -> Iterator[str]:
    """Every payload of a history in JSON, decoded."""
    if isinstance(part, list):
        for item in part:
            yield from _payloads(item)
    elif isinstance(part, dict):
        if isinstance(part.get("data"), str):
            yield base64.b64decode(part["data"]).decode(errors="replace")
        for item in part.values():
            yield from _payloads(item)


def test_a_dockerfile_becomes_a_template_by_the_user_s_own_builder(
    product: Product, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("from a Dockerfile\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {busybox} AS made\nCOPY pages /site\nFROM {busybox}\nCOPY --from=made /site /site\n"
        'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/site"]\n'
    )
    with nothing_left(product):
        ready = "/bin/busybox wget -q -O - http://127.0.0.1:8080/index.html"
        more = ("--memory", "256", "--disk", "32", "--ready-command", ready, "--template-id", "own")
        # A client needs no access to the bucket.
        bucket = ("STORAGE_EMULATOR_HOST", "TEMPLATE_MANAGER_BUCKET")
        arguments = ("build", "--dockerfile", str(tmp_path), *more, "--no-follow")
        started = product.cli(*arguments, without=bucket)
        assert started.code == 0, started.err
        build_id = started.out.strip()
        status = product.ended(build_id)
        assert status["state"] == "completed", status
        assert status["image"].startswith(f"{product.registry}/own:{build_id}@sha256:")
        assert "from a Dockerfile" in product.log(build_id)
        assert tags_of(product.registry, "own") == [build_id]
        assert product.cli("delete", build_id).code == 0
        assert tags_of(product.registry, "own") == []


def test_what_a_host_keeps_is_closed_to_others(product: Product, busybox: str) -> None:
    product.ended(product.build(busybox), 200)
    assert product.data_dir.stat().st_mode & 0o777 == 0o700
    made = [*product.data_dir.glob("logs/*"), *product.data_dir.glob("steps/*/*/*.json")]
    assert made
    assert [path for path in made if path.stat().st_mode & 0o077] == []


def test_steps_and_a_template_on_top_of_them(
    product: Product, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("from a COPY\n")
    sha256 = tar_of_files(tmp_path, ["pages", "pages/index.html"], tmp_path / "files.tar")
    template = pb.TemplateConfig(
        template_id="steps",
        build_id=str(uuid.uuid4()),
        from_image=busybox,
        steps=[
            pb.TemplateStep(type="ENV", args=["GREETING", "it is here"]),
            pb.TemplateStep(type="WORKDIR", args=["/site"]),
            pb.TemplateStep(type="COPY", args=["pages", "."], files_hash=sha256),
        ],
        memory_mb=256,
        vcpu_count=1,
        disk_size_mb=32,
        start_command="exec /bin/busybox httpd -f -p 8080 -h /site",
        ready_command="/bin/busybox wget -q -O - http://127.0.0.1:8080/index.html",
    )
    with nothing_left(product, keep=("files/",)):
        first = product.create(template, {sha256: tmp_path / "files.tar"})
        assert product.ended(first)["state"] == "completed"
        log = product.log(first)
        assert "from a COPY" in log
        sending = [line for line in log if line.startswith(("upload: started", "layer "))]
        assert ": sent " in sending[0]  # the first layer went up before the upload

        told = 'echo "$GREETING in $(/bin/busybox pwd)"; exec /bin/busybox sleep 1000'
        ready = "/bin/busybox sleep 1"
        more = ("--memory", "256", "--start-command", told, "--ready-command", ready, "--no-follow")
        started = product.cli("build", "--from-template", first, *more)
        assert started.code == 0, started.err
        second = started.out.strip()
        assert product.ended(second)["state"] == "completed"
        assert "it is here in /site" in product.log(second)
        pulled = product.cli("pull", second, str(tmp_path / "second"))
        assert pulled.code == 0, pulled.err
        tree = tree_of_ext4(tmp_path / "second" / "rootfs.ext4", tmp_path / "mounted")
        assert "/site/index.html" in tree
        for build_id in (first, second):
            assert product.cli("delete", build_id).code == 0


def test_a_host_is_drained_before_maintenance(product: Product, busybox: str) -> None:
    with nothing_left(product):
        hosts = product.cli("hosts", "--json").json["hosts"]
        [(name, told)] = [(name, told) for name, told in hosts.items() if told]  # others are away
        assert (told["draining"], told["slots"], told["builds"]) == (False, 2, [])
        assert told["firecracker_versions"] == ["v1.13.1"]
        running = product.build(busybox, "--force")
        product.until(running, lambda status: bool(status["host"]))
        drained = product.cli("hosts", "drain", name)
        assert "1 build goes on" in drained.out, drained.err
        product.stack.restart("host")  # it stays drained
        waiting = product.build(busybox)
        assert product.ended(running)["state"] == "completed"
        assert "it has no builds" in product.cli("hosts", "drain", name, "--wait").out
        assert "draining" in product.cli("hosts").out
        assert product.status(waiting)["step"] == "lease_host"
        resumed = product.cli("hosts", "resume", name, "--json")
        assert resumed.json[name]["draining"] is False
        assert product.ended(waiting)["state"] == "completed"
        away = product.cli("hosts", "drain", "no-such-host")
        assert away.code == 3
        assert "no-such-host does not answer" in away.err
        for build_id in (running, waiting):
            assert product.cli("delete", build_id).code == 0


def test_prometheus_is_told(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(busybox)
        assert product.ended(build_id)["state"] == "completed"
        failed = product.build(f"{product.registry}/no/such:image")
        assert product.ended(failed)["state"] == "failed"
        for each in (build_id, failed):
            assert product.cli("delete", each).code == 0
    worker, host = (requests.get(url, timeout=10).text for url in product.metrics)
    unused = r"template_manager_slots_used{[^}]*} 0"
    for _ in range(20):  # shown every few seconds
        if re.search(unused, host):
            break
        time.sleep(1)
        host = requests.get(product.metrics[1], timeout=10).text
    for expected in (
        r'template_manager_builds_total{[^}]*result="completed"[^}]*} [1-9]',
        r'template_manager_builds_total{[^}]*reason="ImageNotFoundError"[^}]*} [1-9]',
        r'template_manager_step_seconds_count{[^}]*step="boot_and_snapshot"[^}]*} [1-9]',
        r'template_manager_steps_total{[^}]*outcome="(done|reused)"[^}]*} [1-9]',
        r"template_manager_queue_seconds_count",
        r"template_manager_resume_seconds_sum",
        r'template_manager_uploaded_bytes_total{[^}]*artifact="memfile"[^}]*} [1-9]',
        r"temporal_workflow_completed",
    ):
        assert re.search(expected, worker), expected
    for expected in (
        r"template_manager_slots{[^}]*} 2",
        unused,
        r"template_manager_disk_free_bytes{[^}]*} [1-9]",
    ):
        assert re.search(expected, host), expected


def test_process_logs_say_which_build_and_step_each_line_is_about(
    product: Product, busybox: str
) -> None:
    with nothing_left(product):
        build_id = product.build(busybox)
        assert product.ended(build_id)["state"] == "completed"
        about = [line for line in product.process_log("host") if line.get("build_id") == build_id]
        assert product.cli("delete", build_id).code == 0
    begun = [line["activity"] for line in about if line["event"] == "activity started"]
    assert {"pull_image", "build_rootfs", "verify_snapshot", "publish_template"} <= {*begun}
    assert {"hold_host", "hold_host_if_free"} & {*begun}  # as it has built the like before, or not
    assert not {"set_up_network", "kill_vm", "upload_artifact"} & {*begun}  # steps are whole
    of_this_project = [line for line in about if line["logger"].startswith("activities.")]
    for line in of_this_project:
        assert line["step"] in STEPS, line
        assert (line["process"], line["workflow_id"]) == ("host", f"template-build-{build_id}")
        assert line["host"] and line["attempt"] == 1
    done = [line for line in about if line["event"] == "activity done"]
    assert len(done) == len(begun)
    assert all(line["seconds"] >= 0 for line in done)


def test_every_process_tells_its_health(product: Product) -> None:
    for address in product.health:
        ended = product.cli("health", address)
        assert (ended.code, ended.out) == (0, "ok\n"), ended.err
        alive = product.cli("health", address, "--live", "--json")
        assert (alive.code, alive.json["ok"]) == (0, True)
    nobody = product.cli("health", f"127.0.0.1:{free_port()}")
    assert nobody.code == 3
    assert "TEMPLATE_MANAGER_HEALTH_ADDRESS" in nobody.err


def test_a_build_is_one_trace(product: Product, busybox: str) -> None:
    with nothing_left(product):
        build_id = product.build(busybox)
        assert product.ended(build_id)["state"] == "completed"
        assert product.cli("delete", build_id).code == 0
    collector = product.collector
    assert collector is not None
    workflow = f"template-build-{build_id}"
    deadline = time.monotonic() + 20
    while True:
        spans = collector.trace_of(workflow)
        names = {span.name for span in spans}
        wanted = {
            "RunActivity:build_rootfs",
            "RunActivity:publish_template",
            "RunActivity:archive_log",
        }
        if wanted <= names:
            break
        assert time.monotonic() < deadline, names
        time.sleep(0.2)
    assert "/TemplateService/TemplateCreate" in names
    assert "RunWorkflow:BuildTemplate" in names
    assert {span.service for span in spans} == {
        "template-manager-api",
        "template-manager-worker",
        "template-manager-host",
    }


def test_an_upgrade_in_the_middle_of_a_build(
    product: Product, busybox: str, tmp_path: Path
) -> None:
    """Worker and host are replaced by changed code while a guest boots: the build goes on."""
    new = _changed_code(tmp_path / "new")
    with nothing_left(product):
        build_id = product.build(busybox, "--force", ready="/bin/busybox sleep 8")
        product.until_logged(build_id, "guest is up")
        for name in ("worker", "host"):
            product.stack.stop(name)
        with _running(product, new, "worker"), _running(product, new, "host"):
            status = product.ended(build_id)
        for name in ("worker", "host"):
            product.stack.restart(name)
        assert status["state"] == "completed", status
        log = product.log(build_id)
        assert "verified by the new code" in log
        assert sum(line.startswith("VM started") for line in log) == 1
        assert product.cli("delete", build_id).code == 0


def _changed_code(directory: Path) -> Path:
    """Copy the product with a change of the workflow that is guarded as it must be."""
    for name in ("activities", "api", "workflows"):
        shutil.copytree(REPOSITORY / name, directory / name)
    path = directory / "workflows" / "build_template.py"
    before = "        await self._step(Step.VERIFY, "
    changed = (
        '        if workflow.patched("verified-by-new-code"):\n'
        '            self._telling.say("verified by the new code")\n'
    )
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, changed + before))
    return directory


@contextmanager
def _running(product: Product, code: Path, process: str) -> Iterator[None]:
    """Run a process of the product from other code."""
    with (code / f"{process}.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "api.cli.main", process],
            cwd=code,
            env={**os.environ, **product.stack.variables, "PYTHONPATH": str(code)},
            stdout=log,
            stderr=log,
        )
        try:
            yield
        finally:
            started.terminate()
            started.wait(60)
