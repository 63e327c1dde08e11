"""Builds of an earlier version, taken over by the present one while they run.

The processes of the commit in `tests/upgrade-from` build; then api, worker and host are replaced
one after the other. Every build ends as if nothing had happened, whatever it was doing.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import images
import psutil
import pytest
from devstack.environment import REPOSITORY
from devstack.stack import APPS

from activities.contract.guest_network import GUEST_ADDRESS
from activities.contract.names import Step
from activities.microvm.network import in_network
from api.pb import template_manager_pb2 as pb
from tests.support.copied_files import tar_of_files
from tests.support.earlier_code import EarlierCode, code_of, earlier_code, upgrade_from
from tests.support.local_http import HTTPD, HTTPD_ANSWERS
from tests.support.real_stack import Product, nothing_left, running_product

pytestmark = [pytest.mark.counts_host, pytest.mark.timeout(400)]

OPTIONS = (
    '{"heartbeat_timeout_seconds": 4, "lease_grace_seconds": 40, "retry_attempts": 4, '
    '"retry_initial_seconds": 0.5, "retry_maximum_seconds": 1}'
)
GATE = 9000
# Not ready until somebody has called.
HELD = f"/bin/busybox nc -l -p {GATE} </dev/null; {HTTPD}"
# Ends in a VM of the present code, and not in a container.
HELD_IN_A_CONTAINER = "test -e /.template/init || sleep 1000"
REFUSED = {
    "kind": "status",
    "status": 403,
    "operation": "compose",
    "path": "memfile",
    "count": None,
}


@dataclass
class Upgrade:
    """A product whose code is being replaced, and its builds by what they do meanwhile."""

    product: Product
    code: EarlierCode
    asked: pb.TemplateConfig
    """What is built, unless a build is of a template."""
    files: Mapping[str, Path]
    """The tars of its COPYs."""
    builds: dict[str, str] = field(default_factory=dict)

    def build(
        self,
        what: str,
        *,
        case: str = "",
        start: str = HTTPD,
        with_login: bool = True,
        last_step: str = "",
    ) -> str:
        """Start a build and remember it by what it is for; returns its id.

        Those of one case are of the same.
        """
        template = pb.TemplateConfig(build_id=str(uuid.uuid4()), start_command=start)
        template.env.update({"CASE": case} if case else {})
        template.MergeFrom(self.asked)
        if not with_login:
            template.ClearField("from_image_registry")
        if last_step:
            template.steps.append(step("RUN", last_step))
        self.builds[what] = self.product.create(template, self.files)
        return self.builds[what]

    def build_on(self, what: str, base: str, *more: str) -> str:
        """Start a build on the template of another one; returns its id."""
        self.builds[what] = self.product.build_from("--from-template", self.builds[base], *more)
        return self.builds[what]

    def build_held(self, what: str) -> None:
        """Have a build whose guest has booted and does not become ready."""
        build_id = self.build(what, case=what, start=HELD)
        self.product.until_logged(build_id, "guest is up")

    def let_go(self, what: str) -> None:
        """Let that guest become ready."""
        [vm] = (self.product.data_dir / "vms").glob(f"*{self.builds[what]}*")
        in_network(vm.name, lambda: socket.create_connection((GUEST_ADDRESS, GATE)).close())

    def start_earlier(self, app: str) -> None:
        """Start a process of the earlier code."""
        self.product.stack.start_app(app, program=self.code.program, **self.code.variables)
        assert self.code_of(app) == self.code.directory

    def replace(self, app: str) -> None:
        """Restart a process with the present code."""
        self.product.stack.start_app(app)
        assert self.code_of(app) == REPOSITORY

    def code_of(self, app: str) -> Path:
        """Return where a process has its code from."""
        pid = self.product.stack.pid(app)
        assert pid is not None
        return code_of(pid)

    def supervisor(self, what: str) -> psutil.Process:
        """Return the process that watches a build's VM. It is the earlier code's."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if self.builds[what] in command and str(self.code.directory) in command:
                    return process
        raise AssertionError("no VM of the earlier code runs")

    def completed(self, what: str) -> set[str]:
        """Wait for a build; its template is whole. Returns the steps that were reused."""
        status = self.product.ended(self.builds[what])
        assert status["state"] == "completed", status
        self.product.require_template(self.builds[what])
        return {row["step"] for row in status["timeline"] if row.get("reused")}

    def log(self, what: str) -> list[str]:
        """Return a build's log."""
        return self.product.log(self.builds[what])


def step(kind: str, *args: str) -> pb.TemplateStep:
    """Return a step of a request."""
    return pb.TemplateStep(type=kind, args=args)


def everything_that_can_be_asked_for(image: str, files_sha256: str) -> pb.TemplateConfig:
    """Return a request with a login, and with a step of every kind on the image."""
    login = pb.GeneralRegistry(username="me", password="of a registry that wants none")

    copy = step("COPY", "index.html", ".")
    copy.files_hash = files_sha256
    return pb.TemplateConfig(
        template_id="alpine-like",
        from_image=image,
        from_image_registry=pb.FromImageRegistry(general=login),
        steps=[
            step("ARG", "WHOM", "us"),
            step("ENV", "GREETING", "hello"),
            step("WORKDIR", "/srv"),
            copy,
            step("RUN", "touch made"),
            step("USER", "root"),
        ],
        memory_mb=256,
        vcpu_count=1,
        disk_size_mb=64,
        ready_command=HTTPD_ANSWERS,
    )


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgrade]:
    """An upgrade that is over, with builds of the earlier code in every state."""
    with (
        earlier_code(upgrade_from()) as code,
        running_product(
            (),
            TEMPLATE_MANAGER_BUILD=OPTIONS,
            TEMPLATE_MANAGER_HOST_SLOTS="3",
        ) as product,
    ):
        image = images.make_and_push("alpine-like", product.registry, lambda _: None)
        place = tmp_path_factory.mktemp("files")
        (place / "index.html").write_text("of a COPY\n")
        sha256 = tar_of_files(place, ["index.html"], place / "files.tar")
        asked = everything_that_can_be_asked_for(image, sha256)
        upgrade = Upgrade(product, code, asked, {sha256: place / "files.tar"})
        for app in APPS:
            upgrade.start_earlier(app)
        with nothing_left(product, keep=("files/",)):
            build_with_earlier_code(upgrade)
            replace_api_and_worker(upgrade)
            replace_host(upgrade)
            yield upgrade
            for build_id in upgrade.builds.values():
                assert product.cli("delete", build_id).code == 0


def build_with_earlier_code(upgrade: Upgrade) -> None:
    """One build ends well, one badly; two guests and a step fill the host; one build waits."""
    product = upgrade.product
    completed = product.ended(upgrade.build("complete"))
    assert completed["state"] == "completed", completed
    with product.stack.faults(REFUSED):
        failed = product.ended(upgrade.build("failed"))
    assert failed["reason"]["error_type"] == "StorageDeniedError"
    upgrade.build_held("booting until the worker is new")
    upgrade.build_held("booting until the host is new")
    in_steps = upgrade.build("in its steps", case="steps", last_step=HELD_IN_A_CONTAINER)
    product.until_logged(in_steps, "/.template/init")
    upgrade.build("waiting since before the API was new")


def replace_api_and_worker(upgrade: Upgrade) -> None:
    """The new API asks the earlier worker, then the new worker asks the earlier host."""
    product = upgrade.product
    upgrade.replace("api")
    waiting = ("waiting since before the API was new", "waiting since the API was new")
    # An earlier host does not open what the new API seals: hosts are upgraded first where builds
    # have logins (CHANGELOG).
    upgrade.build(waiting[1], with_login=False)
    for what in waiting:
        product.until(upgrade.builds[what], lambda status: status["step"] == Step.LEASE)
    upgrade.replace("worker")
    upgrade.let_go("booting until the worker is new")
    for what in ("booting until the worker is new", *waiting):
        ended = product.ended(upgrade.builds[what])
        assert ended["state"] == "completed", (what, ended["reason"])


def replace_host(upgrade: Upgrade) -> None:
    """The host is killed while it makes a root file system and a guest boots on it."""
    product = upgrade.product
    in_rootfs = upgrade.build_on("in rootfs", "complete")
    assert product.during(in_rootfs, "build_rootfs", partial(product.stack.kill, "host"))
    upgrade.build("waiting for the new host")
    upgrade.replace("host")


def test_a_guest_that_boots_is_taken_up_by_the_new_host(upgrade: Upgrade) -> None:
    supervisor = upgrade.supervisor("booting until the host is new")
    upgrade.let_go("booting until the host is new")
    upgrade.completed("booting until the host is new")
    # Nobody may have waited for it since its host was killed: then its end is all that is there.
    assert not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE
    log = upgrade.log("booting until the host is new")
    assert sum(line.startswith("VM started") for line in log) == 1


def test_a_root_file_system_whose_maker_was_killed_is_made_by_the_new_host(
    upgrade: Upgrade,
) -> None:
    upgrade.completed("in rootfs")
    made = [
        line["attempt"]
        for line in upgrade.product.process_log("host")
        if line.get("build_id") == upgrade.builds["in rootfs"]
        and (line["event"], line["activity"]) == ("activity started", "build_rootfs")
    ]
    # The first host may have been killed before it had written that it began.
    assert made in ([1, 2], [2])


def test_a_build_whose_steps_ran_in_containers_goes_on_with_them_in_vms(
    upgrade: Upgrade,
) -> None:
    """In a container the last of them would not have ended."""
    upgrade.completed("in its steps")


def test_a_build_that_waits_for_a_host_gets_the_new_one(upgrade: Upgrade) -> None:
    upgrade.completed("waiting for the new host")


def test_what_the_earlier_code_has_made_of_the_same_is_made_anew(upgrade: Upgrade) -> None:
    """The same inputs give something else now: what we put into a guest has changed since."""
    assert not {Step.ROOTFS, Step.BOOT} & upgrade.completed("waiting for the new host")


def test_a_new_worker_gets_on_with_an_earlier_host(upgrade: Upgrade) -> None:
    upgrade.completed("booting until the worker is new")
    log = upgrade.log("booting until the worker is new")
    assert sum(line.startswith("VM started") for line in log) == 1


def test_builds_that_waited_while_the_workers_were_replaced_had_their_turn(
    upgrade: Upgrade,
) -> None:
    for what in ("waiting since before the API was new", "waiting since the API was new"):
        assert {Step.ROOTFS, Step.BOOT} <= upgrade.completed(what)


def test_a_failed_build_is_retried_with_the_checkpoints_of_the_earlier_code(
    upgrade: Upgrade,
) -> None:
    retried = upgrade.product.cli("retry", upgrade.builds["failed"])
    assert retried.code == 0, retried.err
    reused = upgrade.completed("failed")
    assert {Step.PULL, Step.ROOTFS, Step.BOOT, Step.VERIFY} <= reused


def test_a_template_of_the_earlier_code_is_pulled_whole(upgrade: Upgrade) -> None:
    upgrade.completed("complete")


def test_the_processes_may_be_replaced_in_any_order(upgrade: Upgrade) -> None:
    """The new host gets on with an earlier API and worker, the new worker with an earlier API.

    But for steps in containers, which no host has any more: these builds are to be tried again.
    """
    for app in ("api", "worker"):
        upgrade.start_earlier(app)
    for what, base in (("with the host first", ""), ("on a template", "complete")):
        if base:  # forced: what the earlier host has made of that template would do
            build_id = upgrade.build_on(what, base, "--force")
        else:
            build_id = upgrade.build(what, case="host-first")
        ended = upgrade.product.ended(build_id)
        assert ended["reason"]["error_type"] == "EarlierWorkerError"
        assert "retry the build" in ended["reason"]["hint"]
    upgrade.replace("worker")
    for what in ("with the host first", "on a template"):
        assert upgrade.product.cli("retry", upgrade.builds[what]).code == 0
        upgrade.completed(what)
    for what in ("complete", "with the host first"):
        upgrade.completed(what)
    upgrade.replace("api")
