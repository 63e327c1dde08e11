"""Steps on the disk of a template, each in a real VM."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import docker
import images
import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry
from pyroute2 import netns

from activities.contract.errors import FilesMissingError, ImageStepError, VmmError
from activities.contract.image_steps import Arg, Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.names import VmPurpose
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.disk.ext4 import check_filesystem
from activities.microvm.network import in_network
from activities.store.bucket import Bucket
from activities.store.objects import files_name
from tests.support.command_line import cli, on_terminal
from tests.support.copied_files import upload_as_e2b
from tests.support.local_http import HTTPD, HTTPD_ANSWERS, get_page
from tests.support.step_checks import go_on
from tests.support.step_host import StepHost, base_of, read
from tests.support.vm_host import vm_host

pytestmark = pytest.mark.counts_host


@pytest_asyncio.fixture
async def host(tmp_path: Path, empty_bucket: Bucket) -> AsyncIterator[StepHost]:
    async with vm_host(tmp_path / "data") as made:
        yield StepHost(made, empty_bucket, tmp_path)


def calls_of(host: StepHost, vm: VmRef) -> list[str]:
    """Return the steps that were run, not found."""
    log = host.host.bench.log_of(vm.scope)
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    return [
        m.partition(":")[0] for m in messages if m.startswith("step ") and "used again" not in m
    ]


async def test_steps_make_a_disk(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry, Env=["A=base", "KEPT=1"], Cmd=["/bin/x"])
    tell = 'echo "$A|$B|$VERSION|$KEPT|$HOME|$(pwd)" >made; busybox chmod 640 made'
    made = await host.build(
        base,
        Env(variables=(("A", "it's \\$HOME"), ("B", "2"))),
        Arg(variables=(("VERSION", "7"),)),
        Workdir(path="/srv"),
        Workdir(path="app"),
        Run(command=tell),
        User(name="web"),
        Run(command="busybox id >/tmp/web; echo $VERSION >>/tmp/web"),
        Run(command="busybox id -u >/tmp/root", user="root"),
        start_command="sleep 9",
        env={"MORE": "1"},
    )
    disk = host.disk(made)
    check_filesystem(disk, go_on)
    assert made.facts.init == "added"
    assert 15 <= made.facts.free_mb <= 18
    tree = host.tree(made)
    assert (tree["/srv/app/made"].mode, tree["/srv/app/made"].uid) == (0o640, 0)
    assert (tree["/tmp/web"].uid, tree["/tmp/root"].uid) == (1234, 0)
    assert read(disk, "/srv/app/made") == "it's $HOME|2|7|1|/root|/srv/app\n"
    assert read(disk, "/tmp/web") == "uid=1234(web) gid=1235 groups=1235\n7\n"
    assert read(disk, "/.template/start.command") == "sleep 9"
    assert read(disk, "/.template/user").split() == ["1234", "1235", "-", "web"]
    assert sorted(read(disk, "/.template/env").split("\0")) == sorted(
        [
            "",
            "A=it's $HOME",
            "B=2",
            "HOME=/home",
            "HOSTNAME=instance",
            "KEPT=1",
            "MORE=1",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
    )
    left = {name for name in tree if name.startswith("/.template")}
    assert left == await template_files(host, base)


async def template_files(host: StepHost, image: PulledImage) -> set[str]:
    """Return what a template without steps has in `/.template`."""
    rootfs = await host.host.rootfs(image, host.host.vm(), start_command="sleep 9")
    return {name for name in host.tree(rootfs) if name.startswith("/.template")}


async def test_copy(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    files = host.files(src__main="main", src__sub__more="more", one="1", two="2")
    made = await host.build(
        base,
        Workdir(path="/app"),
        Copy(source="src", destination=".", files_sha256=files),
        Copy(
            source="one",
            destination="/var/run/renamed",
            owner="web",
            mode="0600",
            files_sha256=files,
        ),
        Copy(source="*o*", destination="/tmp", owner="web:staff", files_sha256=files),
    )
    disk, tree = host.disk(made), host.tree(made)
    check_filesystem(disk, go_on)
    assert read(disk, "/app/main") == "main"
    assert read(disk, "/app/sub/more") == "more"
    assert (tree["/app/main"].uid, tree["/app/main"].gid) == (0, 0)
    # The link /var/run was followed, and is still one.
    assert tree["/var/run"].kind == "symlink"
    renamed = tree["/run/renamed"]
    assert (renamed.uid, renamed.gid, renamed.mode) == (1234, 1235, 0o600)
    assert read(disk, "/run/renamed") == "1"
    assert (tree["/tmp/two"].uid, tree["/tmp/two"].gid) == (1234, 50)
    assert tree["/tmp"].mode == 0o1777
    assert "/tmp/src" not in tree


async def test_copy_takes_what_e2bs_sdks_pack(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    zeros = "0" * 6_000_000  # more than a hundred times as much as in the tar
    packed = upload_as_e2b(host.bucket, host.place, {"src/main": "main", "src/sub/zeros": zeros})
    sent = host.bucket.stat_object(files_name(packed))
    assert sent is not None and sent.size_bytes < 60_000
    made = await host.build(base, Copy(source="src", destination="/app/", files_sha256=packed))
    disk, tree = host.disk(made), host.tree(made)
    assert read(disk, "/app/main") == "main"
    assert tree["/app/sub/zeros"].size == 6_000_000
    # What is broken is told, not taken in part.
    found = host.bucket.read_object(files_name(packed))
    assert found is not None
    half = found[0][: len(found[0]) // 2]
    broken = hashlib.sha256(half).hexdigest()
    host.bucket.write_object(files_name(broken), half)
    with pytest.raises(ImageStepError, match="the files cannot be unpacked"):
        await host.build(base, Copy(source="src", destination="/x", files_sha256=broken))


@pytest.mark.whole
async def test_a_copy_of_very_many_small_files(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    files = host.files(**{f"a__{number}": "" for number in range(7000)})
    copy = Copy(source="a", destination="/a", files_sha256=files)
    disk = await host.bare(base, host.host.vm(), disk_size_mb=160)
    made = await host.build(base, copy, disk=disk, disk_size_mb=160)
    assert len([path for path in host.tree(made) if path.startswith("/a/")]) == 7000


async def test_each_step_is_a_checkpoint(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    first = Run(command="echo 1 >>/tmp/log")
    vms = [host.host.vm(purpose=VmPurpose.BOOT) for _ in range(3)]
    made = await host.build(base, first, Run(command="echo 2 >>/tmp/log"), vm=vms[0])
    again = await host.build(base, first, Run(command="echo 2 >>/tmp/log"), vm=vms[1])
    assert (again.fingerprint, again.reused) == (made.fingerprint, True)
    assert calls_of(host, vms[0]) == ["step 1", "step 2"]
    assert calls_of(host, vms[1]) == []
    other = await host.build(base, first, Run(command="echo 3 >>/tmp/log"), vm=vms[2])
    assert calls_of(host, vms[2]) == ["step 2"]
    assert read(host.disk(other), "/tmp/log") == "1\n3\n"


async def test_a_step_begins_as_a_boot_of_its_disk(host: StepHost, registry: Registry) -> None:
    """Whatever an earlier step left running, open or in memory is gone, and its files are whole."""
    base = await base_of(host, registry)
    leave = (
        "busybox sh -c 'exec >/tmp/open; busybox rm /tmp/open; echo x; "
        'trap "echo ended >/tmp/ended; exit" TERM; while :; do busybox sleep 1; done\' & '
        "echo 1 >/dev/shm/one; busybox dd if=/dev/zero of=/tmp/large bs=64k count=32 2>/dev/null"
    )
    look = (
        "busybox ps | busybox grep -c '[/]tmp/open' >/tmp/found; busybox ls /dev/shm >>/tmp/found"
    )
    made = await host.build(base, Run(command=leave), Run(command=look))
    disk = host.disk(made)
    check_filesystem(disk, go_on)
    assert read(disk, "/tmp/found") == "0\n"
    assert read(disk, "/tmp/ended") == "ended\n"
    assert host.tree(made)["/tmp/large"].size == 2 << 20
    assert "/tmp/open" not in host.tree(made)


async def test_a_service_runs_in_its_step_alone(host: StepHost, registry: Registry) -> None:
    """An image with systemd: what is started in one RUN is used in it, and gone in the next."""
    with closing(docker.from_env(timeout=600)) as client:
        repository = f"{registry.address}/with-systemd"
        client.images.get(images.make("debian")).tag(repository, "latest")
        client.images.push(repository, "latest")
        client.images.remove(f"{repository}:latest")
    base = await host.host.bench.pull(repository)
    unit = "[Service]\\nExecStart=/bin/sh -c 'echo $$ >/served; exec sleep 1000'\\n"
    start = (
        f'printf "{unit}" >/etc/systemd/system/web.service && systemctl start web && '
        "sleep 1 && systemctl is-active web >/first && cp /served /pid && "
        "mkdir -m 750 /run/kept && echo 1 >/run/kept/one && echo 2 >/run/kept/two && "
        "echo net.ipv4.ip_unprivileged_port_start=1024 >/etc/sysctl.d/99-x.conf"
    )
    look = (
        "systemctl is-active web >/second; cat /run/kept/* >/of-run && rm /run/kept/two && "
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start >/port"
    )
    made = await host.build(
        base, Run(command=start), Run(command=look), timeout_seconds=240, disk_size_mb=64
    )
    disk = host.disk(made)
    check_filesystem(disk, go_on)
    assert (read(disk, "/first"), read(disk, "/second")) == ("active\n", "inactive\n")
    assert int(read(disk, "/pid")) > 1
    assert read(disk, "/port") == "0\n"  # as in a container, whatever sysctl.d says
    # What a RUN puts into /run stays, although systemd has it in memory.
    assert read(disk, "/of-run") == "1\n2\n"
    tree = host.tree(made)
    assert tree["/run/kept"].mode == 0o750
    before = host.tree(await host.bare(base, host.host.vm(), disk_size_mb=64))
    of_run = {name for name in tree.keys() - before.keys() if name.startswith("/run/")}
    assert {name for name in of_run if "kept" in name} == {"/run/kept", "/run/kept/one"}
    of_systemd = ("/run/systemd", "/run/udev", "/run/log", "/run/agetty")
    assert not any(name.startswith(of_systemd) for name in of_run)


FAILURES = [
    (Run(command="echo to-out; echo to-err >&2; exit 7"), "RUN echo .*: ended with exit code 7"),
    (Run(command=":", user="nobody-there"), "has no user nobody-there"),
    (Run(command="busybox reboot -f"), "the guest has ended: .*Restarting system"),
    (Run(command="busybox sleep 600"), "did not end within 5 s"),
    (
        Run(command="busybox dd if=/dev/zero of=/full bs=64k 2>/dev/null"),
        r"ran out of disk \(16 MiB were free\), ended with exit code 1",
    ),
    (
        Run(command="busybox tail /dev/zero"),
        r"ran out of memory \(256 MiB\), ended with exit code 137",
    ),
]


@pytest.mark.whole
async def test_a_step_that_runs_out_of_processes_says_how_many_there_may_be(
    host: StepHost, registry: Registry
) -> None:
    """Each that waits here is a fork of the shell's that has not even opened what it is to read."""
    base = await base_of(host, registry)
    fork = "busybox mkfifo /tmp/none; while :; do busybox cat </tmp/none & done"
    shape = host.host.shape.model_copy(update={"memory_mb": 1024})
    why = r"^step 1: .*: ran out of processes \(4096 at a time\), ended with exit code 2$"
    with pytest.raises(ImageStepError, match=why) as error:
        await host.build(base, Run(command=fork), shape=shape, timeout_seconds=300)
    assert "can't fork" in error.value.log_tail[-1]


@pytest.mark.parametrize(("step", "why"), FAILURES, ids=[str(step)[:24] for step, _ in FAILURES])
async def test_a_failing_step_is_named_with_its_reason(
    host: StepHost, registry: Registry, step: Run, why: str
) -> None:
    base = await base_of(host, registry)
    seconds = 5 if "sleep" in step.command else 120
    with pytest.raises(ImageStepError, match=f"^step 2: .*{why}$") as error:
        await host.build(base, Env(variables=(("A", "1"),)), step, timeout_seconds=seconds)
    assert error.value.failure().step_number == 2
    if "to-out" in step.command:
        assert set(error.value.log_tail) == {"to-out", "to-err"}


async def test_an_image_without_a_shell_says_what_run_needs(
    host: StepHost, registry: Registry
) -> None:
    registry.push("steps-bare", [Layer().add("static", b"x").tar()])
    base = await host.host.bench.pull(f"{registry.address}/steps-bare")
    files = host.files(one="1")
    with pytest.raises(ImageStepError, match=r"step 2: RUN true: the image has no /bin/sh"):
        await host.build(
            base,
            Copy(source="one", destination="/deep/er/", files_sha256=files),
            Run(command="true"),
        )


async def test_of_very_much_output_the_first_and_the_last_lines_are_told(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    endless = "busybox tr '\\0' x </dev/zero | busybox head -c 9000000"
    command = f"busybox seq 1 300000; {endless}; echo; echo last"
    await host.build(base, Run(command=command), vm=vm)
    log = host.host.bench.log_of(vm.scope).splitlines()
    told = [json.loads(line) for line in log]
    lines = [line["message"] for line in told if line["fields"].get("source") == "RUN"]
    assert lines[:3] == ["1", "2", "3"]
    assert lines[-1] == "last"
    assert len(lines) < 7100  # a piece more than the limit
    assert any("is left out" in line["message"] for line in told)


async def test_what_copy_cannot_do_is_named(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    files = host.files(one="1")
    for copy, why in [
        (Copy(source="two", destination="/x", files_sha256=files), "two: no such file"),
        (Copy(source="../etc", destination="/x", files_sha256=files), "is outside of the files"),
        (
            Copy(source="one", destination="/x", owner="nobody:1", files_sha256=files),
            "/etc/passwd of the image has no nobody",
        ),
    ]:
        with pytest.raises(ImageStepError, match=f"step 1: COPY .*{why}"):
            await host.build(base, copy)


async def test_files_that_are_not_there_are_named(host: StepHost, registry: Registry) -> None:
    base = await base_of(host, registry)
    with pytest.raises(FilesMissingError, match="f" * 64):
        await host.build(base, Copy(source="a", destination="/a", files_sha256="f" * 64))
    files = host.files(a="right")
    host.bucket.write_object(files_name(files), b"somebody else's")
    with pytest.raises(FilesMissingError, match="not what its name says"):
        await host.build(base, Copy(source="a", destination="/a", files_sha256=files))
    assert host.bucket.stat_object(files_name(files)) is None  # there is room for the right ones


async def test_a_run_finds_its_secrets_and_nothing_tells_them(
    host: StepHost, registry: Registry
) -> None:
    """In variables and in files that its user alone reads; a COPY and the template have none."""
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    token, key = f"hunter2-{uuid.uuid4()}", f"first {uuid.uuid4()}\n\nlast {uuid.uuid4()}\n"
    look = (
        'cd /.template/secrets && [ "$TOKEN" = "$(busybox cat TOKEN)" ] && '
        "busybox stat -c '%a %u %n' . * >/tmp/found && busybox md5sum TOKEN KEY >>/tmp/found && "
        'echo "told: $TOKEN" && busybox cat KEY >&2'
    )
    steps: list[ImageStep] = [
        Env(variables=(("TOKEN", "of an ENV"),)),
        User(name="web"),
        Run(command=look),
        Copy(source="a", destination="/a", files_sha256=host.files(a="1")),
        Run(command='echo "failed with $TOKEN"; exit 3', user="root"),
    ]
    secret_env = host.sealed(vm, TOKEN=token, KEY=key)
    with pytest.raises(ImageStepError, match="exit code 3") as error:
        await host.build(base, *steps, vm=vm, secret_env=secret_env)
    assert error.value.log_tail[-1] == "failed with [secret]"
    log = host.log(vm)
    for secret in (token, *key.split()):
        assert secret not in log or secret in ("first", "last")
    assert "told: [secret]" in log

    made = await host.build(base, *steps[:-1], vm=vm, secret_env=secret_env)
    found = read(host.disk(made), "/tmp/found").splitlines()
    assert found[:3] == ["500 1234 .", "400 1234 KEY", "400 1234 TOKEN"]
    hashes = [hashlib.md5(secret.encode()).hexdigest() for secret in (token, key)]
    assert [line.split()[0] for line in found[3:]] == hashes
    env = read(host.disk(made), "/.template/env").split("\0")
    assert "TOKEN=of an ENV" in env
    assert not any(name.startswith("/.template/secrets") for name in host.tree(made))


def settings_of(host: StepHost) -> dict[str, str]:
    """Return the host's settings as the environment of a command."""
    settings, shape = host.host.settings, host.host.shape
    return {
        "TEMPLATE_MANAGER_DATA_DIR": str(settings.data_dir),
        "TEMPLATE_MANAGER_KERNELS_DIR": str(settings.kernels_dir),
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(settings.firecracker_dir),
        "TEMPLATE_MANAGER_DEFAULT_KERNEL_VERSION": shape.kernel_version,
        "TEMPLATE_MANAGER_DEFAULT_FIRECRACKER_VERSION": shape.firecracker_version,
    }


async def test_the_disk_of_a_failed_step_can_be_looked_at(
    host: StepHost, registry: Registry
) -> None:
    """With a shell where the step was, on a copy of the disk; and only while it is kept."""
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    build_id = vm.scope.build_id
    steps: list[ImageStep] = [
        Env(variables=(("A", "of an ENV"),)),
        Workdir(path="/srv"),
        Run(command="echo left >file; exit 3"),
    ]
    with pytest.raises(ImageStepError) as error:
        await host.build(base, *steps, vm=vm, keep_failed=True)
    assert f"template-manager run --disk {build_id}. " in error.value.hint
    kept = host.host.bench.store.failed(build_id)
    assert kept is not None
    before = kept[0].read_bytes()

    typed = 'echo "<$A|$(cat file)|$(pwd)|$(id -u)>"; echo changed >file; exit\n'
    code, shown = await on_terminal(
        "run", "--disk", build_id, columns=200, env=settings_of(host), typed=typed
    )
    assert "<of an ENV|left|/srv|0>" in shown
    assert "RUN echo left >file; exit 3: ended with exit code 3" in shown
    assert code == 0
    assert kept[0].read_bytes() == before

    host.host.bench.store.release(build_id)
    ended = await cli("run", "--disk", build_id, env=settings_of(host))
    assert ended.code == 2
    assert "no disk of a failed step" in ended.err


@pytest.mark.whole
async def test_any_disk_can_be_looked_at(host: StepHost, registry: Registry) -> None:
    """That of a COPY that failed; a file; and what is no disk is told."""
    registry.push("steps-bare", [Layer().add("static", b"x").tar()])
    base = await host.host.bench.pull(f"{registry.address}/steps-bare")
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    files = host.files(one="1")
    copies = [
        Copy(source=name, destination=f"/{name}", files_sha256=files) for name in ("one", "two")
    ]
    with pytest.raises(ImageStepError, match="no such file"):
        await host.build(base, *copies, vm=vm, keep_failed=True)
    kept = host.host.bench.store.failed(vm.scope.build_id)
    assert kept is not None
    look = 'echo "<$(cat /one)|$(pwd)>"; exit\n'  # the image has no shell: it is ours
    for disk in (vm.scope.build_id, str(kept[0])):
        code, shown = await on_terminal(
            "run", "--disk", disk, columns=200, env=settings_of(host), typed=look
        )
        assert (code, "<1|/>" in shown) == (0, True), shown
    (host.place / "no-disk").write_bytes(bytes(4096 * 100))
    for disk, why in [
        ("no-disk", "the guest cannot use the disk: the disk is damaged"),
        ("none", "is neither a build's id nor the file of a disk"),
    ]:
        ended = await cli("run", "--disk", str(host.place / disk), env=settings_of(host))
        assert (ended.code in (1, 2), why in ended.err) == (True, True), ended


@pytest.mark.whole
async def test_a_disk_is_kept_where_it_is_asked_for_alone(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    store, build_id = host.host.bench.store, vm.scope.build_id
    hanging = Run(command="echo x >/tmp/x; busybox sync; busybox sleep 600")
    with pytest.raises(ImageStepError, match="did not end within 5 s"):
        await host.build(base, hanging, vm=vm, keep_failed=True, timeout_seconds=5)
    kept = store.failed(build_id)
    assert kept is not None
    assert read(kept[0], "/tmp/x") == "x\n"
    with pytest.raises(ImageStepError) as error:
        await host.build(base, Run(command="exit 1"), vm=vm)
    assert "run --disk" not in error.value.hint
    assert store.failed(build_id) is None


async def test_a_cancelled_step_ends_within_five_seconds(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    task = asyncio.ensure_future(host.build(base, Run(command="busybox sleep 600"), vm=vm))
    await until(lambda: "guest is up" in host.log(vm))
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 5
    assert not host.host.process(vm).is_running()
    assert not host.host.process(vm).directory.exists()


async def test_a_killed_vmm_loses_its_step_alone(host: StepHost, registry: Registry) -> None:
    """Whatever has been done before is found again, and what comes out is the same."""
    base = await base_of(host, registry)
    steps = [Run(command="echo 1 >/tmp/one"), Run(command="busybox sleep 3; echo 2 >/tmp/two")]
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    task = asyncio.ensure_future(host.build(base, *steps, vm=vm))
    await until(lambda: host.log(vm).count("guest is up") == 2)
    pid, _ = host.host.process(vm)._pids()["vmm"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(VmmError, match="signal 9") as error:
        await task
    assert error.value.retryable
    made = await host.build(base, *steps, vm=vm)
    assert calls_of(host, vm) == ["step 1", "step 2", "step 2"]
    assert read(host.disk(made), "/tmp/one") + read(host.disk(made), "/tmp/two") == "1\n2\n"
    check_filesystem(host.disk(made), go_on)


async def until(is_so: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.1)


async def test_a_disk_grows_so_that_each_step_has_its_room(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    write = "busybox dd if=/dev/urandom of=/{} bs=64k count=200 2>/dev/null"
    made = await host.build(
        base, Run(command=write.format("one")), Run(command=write.format("two"))
    )
    check_filesystem(host.disk(made), go_on)
    assert made.facts.size_mb > 45
    assert 15 <= made.facts.free_mb <= 18
    assert host.tree(made)["/two"].size == 200 * 64 << 10


async def test_what_the_steps_made_becomes_a_template(host: StepHost, registry: Registry) -> None:
    """The boot of today, from the disk that the steps have left."""
    base = await base_of(host, registry)
    whole = host.host.whole(host.host.vm())
    made = await host.build(
        base,
        Workdir(path="/srv"),
        Run(command="echo hello >index.html"),
        vm=whole,
        start_command=HTTPD,
        ready_command=HTTPD_ANSWERS,
    )
    assert whole.name not in netns.listnetns()
    vm = host.host.vm()
    await host.host.start(vm, made)
    await host.host.wait(vm)
    answer = await asyncio.to_thread(in_network, vm.name, lambda: get_page(20))
    assert answer.endswith(b"hello\n")
    snapshot = await host.host.snapshot(vm, made)
    assert snapshot.facts.fsck_clean
