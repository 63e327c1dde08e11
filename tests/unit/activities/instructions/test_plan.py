from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.image_steps import Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.inputs import RunStepsInput
from activities.contract.names import VmPurpose
from activities.contract.results import ImageConfig
from activities.contract.scope import BuildScope, HostLease, VmRef, VmShape
from activities.instructions.plan import plan, values_of
from activities.process.settings import Settings
from tests.support.example_template import pulled_image

BUILDS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")
FIRST, SECOND = Run(command="make"), Run(command="make install", user="root")
COPY = Copy(source="a", destination="b", files_sha256="0" * 64)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    return Settings(busybox_path=busybox)


def asked(*steps: ImageStep, build_id: str = BUILDS[0], **more: Any) -> RunStepsInput:
    lease = HostLease(host="h", number=1)
    scope = BuildScope(build_id=build_id, template_id="t", lease=lease)
    shape = VmShape(memory_mb=1, vcpu_count=1, kernel_version="k", firecracker_version="f")
    values: dict[str, Any] = {
        "vm": VmRef(scope=scope, purpose=VmPurpose.BOOT),
        "disk": RootfsCheckpoint(fingerprint="f" * 64, host="h"),
        "image": pulled_image(),
        "steps": steps,
        "shape": shape,
        "disk_size_mb": 64,
        "timeout_seconds": 1,
        "start_command": "",
        "ready_command": "",
        "env": {},
    }
    return RunStepsInput(**values | more)


def keys(settings: Settings, *steps: ImageStep, **more: Any) -> list[str]:
    return [work.key for work in plan(settings, asked(*steps, **more))]


def test_a_change_reaches_what_follows_it_and_nothing_else(settings: Settings) -> None:
    before = keys(settings, FIRST, COPY, SECOND)
    assert len(set(before)) == 4
    changed = keys(settings, FIRST, COPY.model_copy(update={"files_sha256": "1" * 64}), SECOND)
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, False, False]
    env = keys(settings, FIRST, COPY, Env(variables=(("A", "1"),)), SECOND)
    assert [a == b for a, b in zip(before, env, strict=True)] == [True, True, False, False]
    start = keys(settings, FIRST, COPY, SECOND, start_command="serve", env={"A": "1"})
    assert [a == b for a, b in zip(before, start, strict=True)] == [True, True, True, False]


def test_another_disk_image_or_kernel_changes_everything(settings: Settings) -> None:
    before = set(keys(settings, FIRST, SECOND))
    config = pulled_image().model_copy(update={"config": ImageConfig(user="web")})
    shape = asked().shape
    for more in (
        {"disk": RootfsCheckpoint(fingerprint="0" * 64, host="h")},
        {"image": config},
        {"shape": shape.model_copy(update={"kernel_version": "other"})},
        {"disk_size_mb": 65},
    ):
        assert before.isdisjoint(keys(settings, FIRST, SECOND, **more))
    same = shape.model_copy(update={"memory_mb": 2, "firecracker_version": "other"})
    assert before == set(keys(settings, FIRST, SECOND, shape=same))


def test_what_is_forced_is_the_builds_own(settings: Settings) -> None:
    forced = SECOND.model_copy(update={"force": True})
    ours = keys(settings, FIRST, forced, COPY)
    theirs = keys(settings, FIRST, forced, COPY, build_id=BUILDS[1])
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True, False, False, False]
    assert ours == keys(settings, FIRST, forced, COPY)
    whole = keys(settings, FIRST, force=True)
    assert set(whole).isdisjoint(keys(settings, FIRST, force=True, build_id=BUILDS[1]))


def test_working_directories_are_made_before_what_follows(settings: Settings) -> None:
    steps = (Workdir(path="/a"), Workdir(path="b"), FIRST, User(name="web"), Workdir(path="/c"))
    run, end = plan(settings, asked(*steps))
    assert (run.name, run.directories) == ("step 3: RUN make", ("/a", "/a/b"))
    assert end.directories == ("/c", "/c")
    values = values_of(asked(*steps), run)
    assert (values["workdir.1"], values["workdir.2"], values["workdir"]) == ("/a", "/a/b", "/a/b")
    assert values["image.user"] == pulled_image().config.user


def test_a_run_is_given_its_user_and_environment(settings: Settings) -> None:
    build = asked(Env(variables=(("HOME", "/h"),)), SECOND)
    run, end = plan(settings, build)
    values = values_of(build, run)
    assert values["image.user"] == "root"
    assert "HOME=/h\0" in values["env"]
    assert values["home-is-given"] == ""
    assert "HOME=/h\0" in values_of(build, end)["env"]
    assert "home-is-given" not in values_of(asked(FIRST), plan(settings, asked(FIRST))[0])


@pytest.mark.parametrize(("command", "is_init"), [("/sbin/init", True), ("/bin/serve", False)])
def test_the_images_own_command_is_given_by_words(
    settings: Settings, command: str, is_init: bool
) -> None:
    image = pulled_image().model_copy(update={"config": ImageConfig(cmd=(command, "x y"))})
    build = asked(image=image, start_command="image")
    [end] = plan(settings, build)
    values = values_of(build, end)
    assert values["start.argv"] == f"{command}\0x y\0"
    assert ("start.is-init" in values) == is_init
    assert "start.command" not in values


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        (("/entrypoint", "/sbin/init"), "start.wraps-init"),
        (("/bin/sh", "-c", "exec /sbin/init"), "start.is-init"),
        (("/bin/sh", "-c", "mkdir /x && exec /sbin/init"), "start.wraps-init"),
    ],
)
def test_how_a_command_starts_the_init_is_told(
    settings: Settings, words: tuple[str, ...], mark: str
) -> None:
    image = pulled_image().model_copy(update={"config": ImageConfig(cmd=words)})
    build = asked(image=image, start_command="image")
    [end] = plan(settings, build)
    marks = {"start.wraps-init", "start.is-init"}
    assert values_of(build, end).keys() & marks == {mark}
