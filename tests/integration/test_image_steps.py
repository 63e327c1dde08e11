"""Steps on top of a base image, run by the real dockerd; templates as bases."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import (
    FilesMissingError,
    ImageStepError,
    KernelMissingError,
    TemplateNotFoundError,
    TooManyLayersError,
)
from activities.contract.image_steps import Arg, Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.inputs import BuildImageInput, ImportTemplateInput
from activities.contract.results import PulledImage
from activities.contract.scope import BuildScope, VmShape
from activities.image.docker_daemon import make_docker_client
from activities.image.docker_steps import STEP_REPOSITORY, DockerImageStepActivities
from activities.store.bucket import Bucket
from activities.store.objects import files_name
from tests.support.copied_files import uploaded_files
from tests.support.file_trees import Entry, tree_of_ext4, tree_of_image
from tests.support.host_resources import all_resources, assert_nothing_left

pytestmark = pytest.mark.counts_host


class StepHost:
    """A host with a bucket, and the images that its steps have made."""

    def __init__(self, bench: Workbench, bucket: Bucket, place: Path) -> None:
        self.bench = bench
        self.bucket = bucket
        self.place = place
        self.activities = DockerImageStepActivities(
            bench.settings, bench.ledger, bucket, make_docker_client()
        )

    async def build(
        self, base: PulledImage, *steps: ImageStep, scope: BuildScope | None = None, **more: Any
    ) -> PulledImage:
        asked = BuildImageInput(
            scope=scope or self.bench.scope(), base=base, steps=steps, timeout_seconds=30, **more
        )
        made: PulledImage = await ActivityEnvironment().run(self.activities.build_image, asked)
        return made

    def files(self, **contents: str) -> str:
        """Upload files of these names (`__` is a slash) and contents; returns their tar's name."""
        return uploaded_files(self.bucket, self.place, contents)

    def tree(self, image: PulledImage) -> dict[str, Entry]:
        return tree_of_image(self.bench.client, image.image_id, self.place / uuid.uuid4().hex)


@pytest.fixture
def host(tmp_path: Path, empty_bucket: Bucket) -> Iterator[StepHost]:
    before = all_resources()
    made = StepHost(
        workbench(tmp_path / "data", unsafe_steps_in_containers=True), empty_bucket, tmp_path
    )
    yield made
    client = made.bench.client
    for repository in (STEP_REPOSITORY, "template-manager/template"):
        for found in client.images(name=repository):
            with contextlib.suppress(docker.errors.APIError):
                client.remove_image(found["Id"], force=True)
    made.bench.remove_images()
    assert_nothing_left(before)
    work = tmp_path / "data" / "work"
    assert not work.exists() or list(work.iterdir()) == []


async def base_of(host: StepHost, registry: Registry, **config: Any) -> PulledImage:
    layer = Layer().directory("bin").busybox().symlink("bin/sh", "busybox").directory("etc")
    layer.add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:1234:1235::/home:/bin/sh\n")
    layer.add("etc/group", b"root:x:0:\nstaff:x:50:\n").directory("run").directory("var")
    layer.symlink("var/run", "/run").directory("tmp", mode=0o1777)
    registry.push("steps-base", [layer.tar()], config=config)
    return await host.bench.pull(f"{registry.address}/steps-base")


async def test_steps_make_an_image_and_its_config(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry, Env=["A=base", "KEPT=1"], Cmd=["/bin/x"])
    made = await host.build(
        base,
        Env(variables=(("A", "it's $HOME"), ("B", "2"))),
        Arg(variables=(("VERSION", "7"),)),
        Workdir(path="/srv"),
        Workdir(path="app"),
        Run(command='echo "$A|$B|$VERSION|$KEPT|$(pwd)" > made; chmod 640 made'),
        User(name="web"),
        Run(command="id -u > /tmp/user; echo $VERSION >> /tmp/user"),
        Run(command="id -u > /tmp/root", user="root"),
    )
    assert dict(v.split("=", 1) for v in made.config.env) == {
        "A": "it's $HOME",
        "KEPT": "1",
        "B": "2",
    }
    assert (made.config.user, made.config.working_dir) == ("web", "/srv/app")
    assert made.config.cmd == ("/bin/x",)
    assert made.base_reference == base.reference
    tree = host.tree(made)
    assert (tree["/srv/app/made"].mode, tree["/srv/app/made"].uid) == (0o640, 0)
    assert (tree["/tmp/user"].uid, tree["/tmp/root"].uid) == (1234, 0)
    rootfs = await host.bench.build_rootfs(made)
    inside = tree_of_ext4(rootfs, host.place / "ext4")
    for name in ("/srv/app/made", "/tmp/user"):
        assert inside[name] == tree[name]
    assert not any("docker" in name for name in inside)


async def test_copy(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    files = host.files(src__main="main", src__sub__more="more", one="1")
    made = await host.build(
        base,
        Workdir(path="/app"),
        Copy(source="src", destination=".", owner="", mode="", files_sha256=files),
        Copy(
            source="one",
            destination="/var/run/renamed",
            owner="web",
            mode="0600",
            files_sha256=files,
        ),
        Copy(source="one", destination="/tmp", owner="web:staff", files_sha256=files),
        Copy(source="o*", destination="/etc/new/", owner="7:8", files_sha256=files),
    )
    tree = host.tree(made)
    assert {"/app/main", "/app/sub/more"} <= tree.keys()
    assert (tree["/run/renamed"].mode, tree["/run/renamed"].uid) == (0o600, 1234)
    assert tree["/var/run"].kind == "symlink"
    assert (tree["/tmp/one"].uid, tree["/tmp/one"].gid) == (1234, 50)
    assert (tree["/etc/new/one"].uid, tree["/etc/new/one"].gid) == (7, 8)
    assert tree["/tmp"].mode == 0o1777


async def test_an_account_is_found_behind_lines_of_any_length(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    made = await host.build(
        base,
        Run(
            command="{ head -c 200000000 /dev/zero | tr '\\0' x;"
            " printf '\\nlater:x:79:80::/:/bin/sh'; } >> /etc/passwd"
        ),
        Copy(source="a", destination="/a", owner="later", files_sha256=host.files(a="1")),
    )
    tree = host.tree(made)
    assert (tree["/a"].uid, tree["/a"].gid) == (79, 80)


async def test_an_endless_line_of_a_step_is_cut_in_no_time(
    host: StepHost, registry: Registry
) -> None:
    base, scope = await base_of(host, registry), host.bench.scope()
    began = time.monotonic()
    await host.build(base, Run(command="head -c 60000000 /dev/zero | tr '\\0' x"), scope=scope)
    assert time.monotonic() - began < 30
    assert "more bytes cut" in host.bench.log_of(scope)
    assert len(host.bench.log_of(scope)) < 20_000


async def test_of_very_much_output_the_first_and_the_last_lines_are_told(
    host: StepHost, registry: Registry
) -> None:
    base, scope = await base_of(host, registry), host.bench.scope()
    with pytest.raises(ImageStepError) as caught:
        await host.build(base, Run(command="seq 30000; echo why; exit 1"), scope=scope)
    assert caught.value.log_tail[-2:] == ("30000", "why")
    log = host.bench.log_of(scope)
    assert '"message":"5000"' in log and '"message":"5001"' not in log
    assert "24981 more lines of output are left out" in log


async def test_each_step_is_a_checkpoint(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    first = Run(command="cat /proc/sys/kernel/random/uuid > /first")
    second = Run(command="cat /proc/sys/kernel/random/uuid > /second")
    one = host.tree(await host.build(base, first, second))
    scope = host.bench.scope()
    again = await host.build(base, first, second, scope=scope)
    assert host.tree(again)["/second"] == one["/second"]
    assert host.bench.log_of(scope).count("used again") == 2
    other = host.tree(await host.build(base, first, Run(command="true"), second))
    assert other["/first"] == one["/first"]
    assert other["/second"] != one["/second"]
    forced = host.tree(await host.build(base, first, second.model_copy(update={"force": True})))
    assert forced["/first"] == one["/first"]
    assert forced["/second"] != one["/second"]
    everything = host.tree(await host.build(base, first, second, force=True))
    assert everything["/first"] != one["/first"]


async def test_a_tenant_s_steps_and_files_are_its_own(
    host: StepHost, registry: Registry, tmp_path: Path
) -> None:
    base = await base_of(host, registry)
    step = Run(command="cat /proc/sys/kernel/random/uuid > /made")
    files = host.files(a="x")  # the default tenant's
    made = {}
    for tenant in ("default", "acme"):
        scope = host.bench.scope().model_copy(update={"tenant": tenant})
        image = await host.build(base, step, scope=scope)
        made[tenant] = (image.digest, host.tree(image)["/made"], image.tenant)
    assert made["default"][:2] != made["acme"][:2]
    assert [made[tenant][2] for tenant in made] == ["default", "acme"]
    copy = Copy(source="a", destination="/a", files_sha256=files)
    with pytest.raises(FilesMissingError, match=f"files/acme/{files}"):
        await host.build(base, copy, scope=scope)


async def test_an_environment_makes_another_checkpoint(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    keys = {
        (await host.build(base, Env(variables=(("A", value),)), Run(command="echo $A > /a"))).digest
        for value in ("1", "2")
    }
    assert len(keys) == 2


async def test_a_failing_step_is_named_with_its_output(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    with pytest.raises(
        ImageStepError, match="RUN echo broken; exit 4: ended with exit code 4"
    ) as e:
        await host.build(base, Run(command="true"), Run(command="echo broken; exit 4"))
    assert e.value.log_tail[-1] == "broken"
    assert e.value.hint


async def test_a_step_that_takes_too_long(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    asked = BuildImageInput(
        scope=host.bench.scope(), base=base, steps=(Run(command="sleep 100"),), timeout_seconds=1
    )
    with pytest.raises(ImageStepError, match="did not end within 1 s"):
        await ActivityEnvironment().run(host.activities.build_image, asked)


async def test_a_cancelled_step_stops_at_once(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(environment.info, heartbeat_timeout=timedelta(seconds=1))
    scope = host.bench.scope()
    asked = BuildImageInput(
        scope=scope, base=base, steps=(Run(command="echo go; sleep 100"),), timeout_seconds=60
    )
    task = asyncio.ensure_future(environment.run(host.activities.build_image, asked))
    deadline = time.monotonic() + 20
    while '"go"' not in host.bench.log_of(scope) if _has_log(host, scope) else True:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)


def _has_log(host: StepHost, scope: BuildScope) -> bool:
    return (host.bench.settings.data_dir / "logs" / f"{scope.build_id}.jsonl").exists()


async def test_a_base_without_a_shell_says_what_run_needs(
    host: StepHost, registry: Registry
) -> None:
    registry.push("steps-bare", [Layer().busybox("server").tar()])
    base = await host.bench.pull(f"{registry.address}/steps-bare")
    with pytest.raises(ImageStepError, match="cannot be started") as error:
        await host.build(base, Run(command="true"))
    assert "/bin/sh" in error.value.hint
    files = host.files(page="hello")
    made = await host.build(base, Copy(source="page", destination="/srv/", files_sha256=files))
    assert "/srv/page" in host.tree(made)


async def test_missing_files_and_accounts_are_named(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    with pytest.raises(FilesMissingError, match="f" * 64):
        await host.build(base, Copy(source="a", destination="/a", files_sha256="f" * 64))
    files = host.files(a="1")
    with pytest.raises(ImageStepError, match="no ghost"):
        await host.build(
            base, Copy(source="a", destination="/a", owner="ghost", files_sha256=files)
        )
    with pytest.raises(ImageStepError, match="COPY b: no such file"):
        await host.build(base, Copy(source="b", destination="/a", files_sha256=files))


async def test_files_that_are_not_what_their_name_says_make_room_for_the_right_ones(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    files = host.files(a="right")
    right = host.bucket.read_object(files_name(files))
    assert right is not None
    host.bucket.write_object(files_name(files), b"somebody else's")
    copy = Copy(source="a", destination="/a", files_sha256=files)
    with pytest.raises(FilesMissingError, match="not what its name says"):
        await host.build(base, copy)
    assert host.bucket.stat_object(files_name(files)) is None
    host.bucket.write_object(files_name(files), right[0])
    assert "/a" in host.tree(await host.build(base, copy))


async def test_two_builds_of_the_same_steps_at_once(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    steps = (Run(command="cat /proc/sys/kernel/random/uuid > /made; sleep 1"),)
    one, other = await asyncio.gather(host.build(base, *steps), host.build(base, *steps))
    assert one.image_id == other.image_id


async def test_more_layers_than_docker_takes_are_refused_before_the_first_step(
    host: StepHost, registry: Registry
) -> None:
    base = (await base_of(host, registry)).model_copy(update={"layer_count": 110})
    steps: list[ImageStep] = [
        Run(command="exit 1"),
        Env(variables=(("A", "1"),)),
        *[Workdir(path="/srv")] * 19,
    ]
    with pytest.raises(TooManyLayersError, match=r"110 layers and 20 steps .* takes 125") as error:
        await host.build(base, *steps)
    assert not error.value.retryable


async def test_a_host_without_the_kernel_takes_no_template(host: StepHost) -> None:
    shape = VmShape(
        memory_mb=128, vcpu_count=1, kernel_version="vmlinux-0.1", firecracker_version="v0.0.1"
    )
    asked = ImportTemplateInput(scope=host.bench.scope(), build_id=str(uuid.uuid4()), shape=shape)
    with pytest.raises(KernelMissingError, match=r"vmlinux-0\.1/vmlinux\.bin"):
        await ActivityEnvironment().run(host.activities.import_template, asked)


async def test_a_base_template_that_is_not_there(host: StepHost) -> None:
    asked = ImportTemplateInput(scope=host.bench.scope(), build_id=str(uuid.uuid4()))
    with pytest.raises(TemplateNotFoundError):
        await ActivityEnvironment().run(host.activities.import_template, asked)
