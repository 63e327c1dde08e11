"""How start and ready commands of real guests fare, and how their failures are told."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker
import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry, running_registry

from activities.contract.errors import (
    GuestDiedError,
    ReadyTimeoutError,
    StartCommandError,
    TemplateManagerError,
)
from activities.contract.requests import IMAGE_COMMAND
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.contract.status import LogEntry, LogLevel
from activities.step.build_log import read_entries
from tests.support.probed_images import ACCOUNTS, GROUPS, ProbedImage
from tests.support.vm_host import VmHost, vm_host

pytestmark = pytest.mark.counts_host

Push = Callable[[ProbedImage], str]
SOON = "/probe/busybox sleep 1000"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with vm_host(tmp_path / "data") as made:
        yield made


@pytest.fixture
def push(registry: Registry) -> Iterator[Push]:
    """Make an image and push it; returns its reference."""
    made: list[str] = []
    with closing(docker.from_env(timeout=600)) as client:

        def make_and_push(image: ProbedImage) -> str:
            image_id = image.make(client)
            made.append(image_id)
            repository = f"{registry.address}/commands-{len(made)}-{abs(hash(image.name))}"
            client.images.get(image_id).tag(repository, "latest")
            client.images.push(repository, "latest")
            return f"{repository}:latest"

        yield make_and_push
        for image_id in made:
            client.images.remove(image_id, force=True)


async def booted(host: VmHost, image: PulledImage, seconds: float = 120, **more: Any) -> VmRef:
    """Boot an image and wait until it is ready."""
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, **more)
    await host.start(vm, rootfs)
    await host.wait(vm, seconds)
    return vm


async def failing(
    host: VmHost, image: PulledImage, seconds: float = 120, **more: Any
) -> tuple[TemplateManagerError, list[LogEntry]]:
    """Boot an image that must not become ready; returns why, and its log."""
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, **more)
    await host.start(vm, rootfs)
    with pytest.raises(TemplateManagerError) as error:
        await host.wait(vm, seconds)
    return error.value, log_of(host, vm)


def log_of(host: VmHost, vm: VmRef) -> list[LogEntry]:
    return read_entries(host.bench.settings.data_dir / "logs" / f"{vm.scope.build_id}.jsonl")


def messages(log: list[LogEntry], level: LogLevel | None = None) -> list[str]:
    return [entry.message for entry in log if level in (None, entry.level)]


def alpine(name: str, layer: Layer | None = None, **more: Any) -> ProbedImage:
    return ProbedImage(name, "alpine-like", layer or Layer(), **more)


def debian(name: str, layer: Layer | None = None, **more: Any) -> ProbedImage:
    return ProbedImage(name, "debian", layer or Layer(), **({"cmd": ("/sbin/init",)} | more))


def with_unit(name: str, unit: bytes, by: str) -> Layer:
    """A unit of systemd that a target asks for: `by` is the directory that says so."""
    where = "etc/systemd/system"
    layer = Layer().directory("etc").directory("etc/systemd").directory(where)
    layer.add(f"{where}/{name}", unit).directory(f"{where}/{by}")
    return layer.symlink(f"{where}/{by}/{name}", f"../{name}")


@pytest.mark.parametrize("base", [alpine, debian], ids=["busybox", "systemd"])
async def test_no_such_start_command_is_no_success_whatever_the_ready_command_says(
    host: VmHost, push: Push, base: Callable[[str], ProbedImage]
) -> None:
    image = await host.bench.pull(push(base("missing")))
    error, log = await failing(host, image, start_command="/nope", ready_command="true")
    assert isinstance(error, StartCommandError)
    assert "exit code 127 (not found)" in error.message
    assert any("/nope" in line for line in error.log_tail)
    assert any("/nope" in line for line in messages(log))


async def test_a_prompt_is_in_the_log_and_in_the_errors_tail(host: VmHost, push: Push) -> None:
    image = await host.bench.pull(push(alpine("prompt")))
    start = f"echo the license; printf 'accept? '; {SOON}"
    error, log = await failing(host, image, 25, start_command=start, ready_command="false")
    assert isinstance(error, ReadyTimeoutError)
    assert "accept? " in error.log_tail
    assert {"the license", "accept? "} <= set(messages(log))


@pytest.mark.whole
async def test_a_ready_command_that_is_not_found_is_named_early(host: VmHost, push: Push) -> None:
    image = await host.bench.pull(push(alpine("ready")))
    error, log = await failing(host, image, 15, start_command=SOON, ready_command="chekc -q")
    [warning] = messages(log, LogLevel.WARN)
    assert "chekc" in warning
    assert "exit code 127 (not found)" in error.message
    told = next(entry.timestamp for entry in log if entry.level is LogLevel.WARN)
    began = next(entry.timestamp for entry in log if "guest is up" in entry.message)
    assert (told - began).total_seconds() < 8


@pytest.mark.whole
@pytest.mark.whole
async def test_a_ready_command_may_need_more_than_its_first_attempt_has(
    host: VmHost, push: Push
) -> None:
    """As what E2B's wait_for_timeout(40_000) is."""
    image = await host.bench.pull(push(alpine("slow")))
    ready = "/probe/busybox sleep 40"
    vm = await booted(host, image, 240, start_command=SOON, ready_command=ready)
    told = messages(log_of(host, vm))
    assert "[ended after 30 s; the next attempt may take 120 s]" in told


async def test_without_a_ready_command_the_rule_of_a_second_is_told(
    host: VmHost, push: Push
) -> None:
    image = await host.bench.pull(push(alpine("second")))
    vm = await booted(host, image, start_command=SOON)
    [warning] = messages(log_of(host, vm), LogLevel.WARN)
    assert "no ready command" in warning


async def test_progress_and_colours_are_readable(host: VmHost, push: Push) -> None:
    image = await host.bench.pull(push(alpine("colours")))
    start = (
        r"printf '\033[31mred\033[0m\n'; for n in 10 50 100; do printf '%s %%\r' $n; done; "
        rf"printf 'done \033]0;title\007now\n'; {SOON}"
    )
    vm = await booted(host, image, start_command=start, ready_command="sleep 2")
    told = messages(log_of(host, vm))
    assert "red" in told
    assert "done now" in told
    assert not any("\x1b" in line or "[31m" in line or "\ufffd" in line for line in told)


@pytest.mark.whole
async def test_an_endless_line_is_cut_and_costs_little(host: VmHost, push: Push) -> None:
    image = await host.bench.pull(push(alpine("endless")))
    start = f"/probe/busybox head -c 60000000 /dev/zero | /probe/busybox tr '\\0' x; {SOON}"
    vm = host.vm()
    rootfs = await host.rootfs(image, vm, start_command=start, ready_command="true")
    await host.start(vm, rootfs)
    began = time.monotonic()
    await host.wait(vm, 120)
    assert time.monotonic() - began < 60
    assert all(len(line) < 20_000 for line in messages(log_of(host, vm)))


async def test_an_init_that_ends_is_named_with_its_last_words(host: VmHost, push: Push) -> None:
    layer = Layer().directory("etc").add("etc/inittab", b"# sysvinit's\n")
    layer.add("sbin/init", b"#!/bin/sh\necho no runlevels here: goodbye\nexit 3\n", mode=0o755)
    image = await host.bench.pull(push(alpine("ends", layer)))
    error, _ = await failing(host, image, ready_command="false")
    assert isinstance(error, GuestDiedError)
    assert "init (other /sbin/init) ended with exit code 3" in error.message
    assert any("no runlevels here: goodbye" in line for line in error.log_tail)


@pytest.mark.whole
async def test_what_only_has_the_name_of_an_init_is_not_taken_for_one(
    host: VmHost, push: Push
) -> None:
    layer = Layer().directory("usr").directory("usr/bin").directory("sbin")
    layer.add("usr/bin/tini", b'#!/bin/sh\nexec "$@"\n', mode=0o755)
    layer.symlink("sbin/init", "../usr/bin/tini").add("init", b"#!/bin/sh\nexit 1\n", mode=0o755)
    image = await host.bench.pull(push(alpine("tini", layer)))
    vm = await booted(host, image, start_command="true", ready_command="true")
    told = messages(log_of(host, vm))
    assert any("/sbin/init is no init that we know (/usr/bin/tini)" in line for line in told)
    assert "guest is up (init: added)" in [line.rstrip() for line in told]


async def test_the_start_command_runs_whatever_systemds_default_target_is(
    host: VmHost, push: Push
) -> None:
    own = b"[Unit]\nDescription=Ours\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n"
    layer = Layer().directory("etc").directory("etc/systemd").directory("etc/systemd/system")
    layer.add("etc/systemd/system/ours.target", own)
    layer.symlink("etc/systemd/system/default.target", "ours.target")
    image = await host.bench.pull(push(debian("target", layer)))
    await booted(host, image, start_command=f"touch /here; {SOON}", ready_command="test -e /here")


@pytest.mark.whole
async def test_systemd_does_not_wait_for_the_devices_of_fstab(host: VmHost, push: Push) -> None:
    fstab = (
        b"# a comment\n"
        b"LABEL=cloudimg-rootfs / ext4 defaults 0 1\n"
        b"LABEL=UEFI /boot/efi vfat umask=0077 0 1\n"
        b"UUID=9f3c1f0e-0000-4000-8000-000000000000 none swap sw 0 0\n"
    )
    image = await host.bench.pull(push(debian("fstab", Layer().add("etc/fstab", fstab))))
    began = time.monotonic()
    vm = await booted(host, image, start_command=SOON, ready_command="true")
    assert time.monotonic() - began < 80
    told = [line for line in messages(log_of(host, vm)) if "fstab" in line]
    assert len(told) == 3
    assert any("LABEL=UEFI /boot/efi vfat" in line for line in told)


@pytest.mark.parametrize(
    "command",
    [
        ("/sbin/init",),
        pytest.param(("/bin/sh", "-c", "exec /sbin/init"), marks=pytest.mark.whole),
    ],
    ids=["words", "a shell's line"],
)
async def test_an_image_whose_command_is_its_init_needs_no_other(
    host: VmHost, push: Push, command: tuple[str, ...]
) -> None:
    image = await host.bench.pull(push(debian("init", cmd=command)))
    vm = await booted(
        host,
        image,
        start_command=IMAGE_COMMAND,
        ready_command="systemctl is-active basic.target",
    )
    assert not any("start command" in line for line in messages(log_of(host, vm)))


@pytest.mark.whole
async def test_a_program_that_would_start_the_init_is_refused_before_the_boot(
    host: VmHost, push: Push
) -> None:
    image = await host.bench.pull(push(debian("wrapped", entrypoint=("/entrypoint",))))
    with pytest.raises(StartCommandError, match="starts its init by another program: /entrypoint"):
        await host.rootfs(image, host.vm(), start_command=IMAGE_COMMAND)


async def test_a_flood_of_output_does_not_hold_the_start_command_up(
    host: VmHost, push: Push
) -> None:
    """The console takes a byte at a time; a container's log takes all of it at once."""
    line = "a line of a program that says a lot when it starts, 0123456789"
    start = f"yes '{line}' | head -c 30000000; echo; echo all said; echo >/said; {SOON}"
    image = await host.bench.pull(push(alpine("flood")))
    vm = await booted(host, image, start_command=start, ready_command="test -e /said")
    told = [
        entry.message for entry in log_of(host, vm) if entry.fields.get("source") == "start command"
    ]
    assert told[-1] == "all said"
    notes = [found for text in told if (found := re.fullmatch(r"\[(\d+) bytes .*\]", text))]
    shown = sum(len(text) + 1 for text in told if not text.startswith("["))
    left_out = sum(int(note[1]) for note in notes)
    missing = 30_000_010 - shown - left_out  # a block each time at the most
    assert -200 < missing < 4400 * (len(notes) + 1)
    assert shown > 200_000


@pytest.mark.whole
async def test_a_flood_does_not_hide_why_the_start_command_ends(host: VmHost, push: Push) -> None:
    start = "yes 'a line of a flood' | head -c 5000000; echo; echo no license >&2; echo bye; exit 3"
    image = await host.bench.pull(push(alpine("flooded")))
    error, log = await failing(host, image, start_command=start, ready_command="false")
    assert isinstance(error, StartCommandError)
    assert "bye" in error.log_tail
    assert "no license" in messages(log)


@pytest.mark.whole
async def test_what_systemd_waits_for_is_named(host: VmHost, push: Push) -> None:
    unit = (
        b"[Unit]\nDefaultDependencies=no\nBefore=sysinit.target\n"
        b"[Service]\nType=oneshot\nExecStart=/bin/sleep infinity\nTimeoutStartSec=infinity\n"
    )
    layer = with_unit("hang.service", unit, "sysinit.target.wants")
    image = await host.bench.pull(push(debian("hangs", layer)))
    # systemd says it after 25 s of its own.
    error, _ = await failing(host, image, 120, start_command=SOON, ready_command="true")
    assert isinstance(error, ReadyTimeoutError)
    assert "has not come to the start command within 120 s" in error.message
    assert "hang.service" in error.message


@pytest.mark.whole
async def test_an_init_that_hides_the_devices_is_told(host: VmHost, push: Push) -> None:
    inittab = b"::sysinit:/probe/busybox mount -t tmpfs tmpfs /dev\n"
    layer = Layer().directory("etc").add("etc/inittab", inittab)
    layer.directory("sbin").symlink("sbin/init", "/bin/busybox")
    image = await host.bench.pull(push(alpine("hides", layer)))
    error, _ = await failing(host, image, 60, start_command=SOON, ready_command="false")
    assert "has mounted something over /dev" in error.message


@pytest.mark.whole
async def test_a_systemd_that_cannot_be_run_is_named(host: VmHost, push: Push) -> None:
    layer = Layer()
    for name in ("usr", "usr/lib", "usr/lib/systemd"):
        layer.directory(name)
    layer.add("usr/lib/systemd/systemd", b"\x7fELF broken", mode=0o755)
    image = await host.bench.pull(push(alpine("broken", layer)))
    error, _ = await failing(host, image, start_command=SOON, ready_command="true")
    assert isinstance(error, GuestDiedError)
    assert "its init (systemd /usr/lib/systemd/systemd) ended with exit code" in error.message


async def test_a_volume_over_the_accounts_hides_no_user(host: VmHost, push: Push) -> None:
    layer = Layer().directory("etc").add("etc/passwd", ACCOUNTS).add("etc/group", GROUPS)
    layer.directory("home/app", uid=1234, gid=1235)
    image = await host.bench.pull(push(alpine("volume", layer, user="app", volumes=("/etc",))))
    start = f"/probe/busybox id > /home/app/id; {SOON}"
    check = "/probe/busybox grep -q '^uid=1234(app) .*4321(extra)' /home/app/id"
    await booted(host, image, start_command=start, ready_command=check)


@pytest.mark.parametrize(
    "words", [("ls", "x=y"), ("/opt/a=b/ls", "x=y")], ids=["an applet's name", "a = in the path"]
)
async def test_the_image_s_own_program_runs(
    host: VmHost, push: Push, words: tuple[str, ...]
) -> None:
    """busybox has an applet of that name, and env takes what has a = in it for a variable."""
    lines = [
        "#!/bin/sh",
        'echo "$0 $* $HERE" >/tmp/ran',
        # As it was given: a shell passes on no variable with a dot in its name.
        "tr '\\0' '\\n' </proc/$$/environ >>/tmp/ran",
        SOON,
    ]
    program = "\n".join(lines)
    layer = Layer().directory("opt").directory("opt/bin").directory("opt/a=b")
    layer.add("opt/bin/ls", program.encode(), mode=0o755)
    layer.add("opt/a=b/ls", program.encode(), mode=0o755)
    env = {"PATH": "/opt/bin:/usr/bin:/bin", "HERE": "a b", "a.b": "dotted"}
    env |= {} if "/" in words[0] else {"LD_PRELOAD": "/no.so"}  # for the image's programs alone
    made = alpine("own", layer, entrypoint=words[:1], cmd=words[1:], env=env)
    path = words[0] if "/" in words[0] else f"/opt/bin/{words[0]}"
    image = await host.bench.pull(push(made))
    ready = f"grep -qx '{path} x=y a b' /tmp/ran && grep -qx a.b=dotted /tmp/ran"
    vm = await booted(host, image, start_command=IMAGE_COMMAND, ready_command=ready)
    assert not any("LD_PRELOAD" in line for line in messages(log_of(host, vm)))


@pytest.mark.whole
async def test_an_image_without_files_boots(host: VmHost, push: Push) -> None:
    image = await host.bench.pull(push(ProbedImage("nothing", cmd=("/probe/busybox", "true"))))
    await booted(host, image, start_command=IMAGE_COMMAND)


async def test_systemd_leaves_what_the_image_has_as_a_container_sees_it(
    host: VmHost, push: Push
) -> None:
    """Files where a boot clears up, modes that tmpfiles.d sets back, sysctls of the image's own."""
    layer = Layer().directory("tmp", 0o1777).directory("tmp/app").add("tmp/app/keep", b"x")
    layer.directory("run").directory("run/app", 0o750, uid=33, gid=33).add("run/app/keep", b"x")
    layer.directory("run/lock", 0o1777).add("run/lock/keep", b"x")
    layer.directory("srv", 0o700).symlink("srv/link", "here it is").directory("var").directory(
        "var/log", 0o777
    )
    layer.directory("etc").directory("etc/tmpfiles.d").directory("etc/sysctl.d")
    layer.add(
        "etc/tmpfiles.d/a.conf",
        b"D /tmp 1777 root root\nd /srv 0755 root root\n"
        b"z /run/ap* 0700 root root\nR! /run/lock/keep\nL+ /srv/link - - - - elsewhere\n",
    )
    layer.add(
        "etc/sysctl.d/a.conf", b"net.ipv4.ip_unprivileged_port_start=1024\nkernel.hostname=other\n"
    )
    look = (
        "cat /tmp/app/keep /run/app/keep /run/lock/keep; echo; "
        "stat -c '%a %u %n' /run/app /run/lock /srv /var/log; readlink /srv/link; hostname; "
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; "
        "grep -Ec '^Max (processes|pending signals) +unlimited' /proc/self/limits"
    )
    image = await host.bench.pull(push(debian("keeps", layer)))
    vm = await booted(host, image, start_command=f"{look}; {SOON}", ready_command="sleep 1")
    told = [
        entry.message for entry in log_of(host, vm) if entry.fields.get("source") == "start command"
    ]
    assert told == [
        "xxx",
        "750 33 /run/app",
        "1777 0 /run/lock",
        "700 0 /srv",
        "777 0 /var/log",
        "here it is",
        "instance",
        "0",
        "2",
    ]


@pytest.mark.whole
async def test_a_long_line_begins_with_its_beginning_and_characters_stay_whole(
    host: VmHost, push: Push
) -> None:
    image = await host.bench.pull(push(alpine("long")))
    start = (
        "b=/probe/busybox; printf START; $b head -c 100000 /dev/zero | $b tr '\\0' x; echo END; "
        f"for i in $($b seq 2000); do printf aé☃😀; done; echo; {SOON}"
    )
    vm = await booted(host, image, start_command=start, ready_command="/probe/busybox sleep 5")
    lines = [line for line in messages(log_of(host, vm)) if line.startswith(("START", "aé"))]
    assert len(lines) == 2
    shown, _, rest = lines[0].partition("… [")
    assert len(shown) + int(rest.split()[0]) == 100_008
    assert not any("\ufffd" in line for line in lines)


@pytest.mark.whole
async def test_systemd_that_gives_up_is_told_at_once_with_what_has_failed(
    host: VmHost, push: Push
) -> None:
    unit = (
        b"[Unit]\nDescription=The data\nDefaultDependencies=no\nBefore=sysinit.target\n"
        b"OnFailure=emergency.target\n[Service]\nType=oneshot\nExecStart=/bin/false\n"
    )
    layer = with_unit("data.service", unit, "sysinit.target.requires")
    image = await host.bench.pull(push(debian("emergency", layer)))
    began = time.monotonic()
    error, _ = await failing(host, image, 300, start_command=SOON, ready_command="true")
    assert isinstance(error, GuestDiedError)
    assert "in emergency mode; the start command has not begun" in error.message
    assert "data.service" in error.message or "The data" in error.message
    assert time.monotonic() - began < 150
