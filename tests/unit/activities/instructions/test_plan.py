from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint
from activities.contract.errors import ImageStepError
from activities.contract.image_steps import Add, Copy, Env, ImageStep, Meaning, Run, User, Workdir
from activities.contract.inputs import RunStepsInput
from activities.contract.names import VmPurpose
from activities.contract.network_policy import INTERNET, NO_NETWORK, NetworkPolicy
from activities.contract.results import ImageConfig
from activities.contract.scope import BuildScope, HostLease, VmRef, VmShape
from activities.instructions.plan import MadeDirectory, MadeUser, chain_of, plan, values_of
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


def test_each_disk_of_a_build_is_named_after_those_below_it(settings: Settings) -> None:
    base = DiskKey(fingerprint="f" * 64)
    disk = RootfsCheckpoint(fingerprint=base.fingerprint, host="h", chain=(base,))
    build = asked(FIRST, COPY, disk=disk)
    todo = plan(settings, build)
    own = [DiskKey(owner="default", fingerprint=work.key) for work in todo]
    assert chain_of(build, todo) == (base, *own)
    assert chain_of(asked(FIRST, COPY), todo) == ()  # a host of before has not told of its base


def test_a_change_reaches_what_follows_it_and_nothing_else(settings: Settings) -> None:
    before = keys(settings, FIRST, COPY, SECOND)
    assert len(set(before)) == 4
    changed = keys(settings, FIRST, COPY.model_copy(update={"files_sha256": "1" * 64}), SECOND)
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, False, False]
    env = keys(settings, FIRST, COPY, Env(variables=(("A", "1"),)), SECOND)
    assert [a == b for a, b in zip(before, env, strict=True)] == [True, True, False, False]
    start = keys(settings, FIRST, COPY, SECOND, start_command="serve", env={"A": "1"})
    assert [a == b for a, b in zip(before, start, strict=True)] == [True, True, True, False]


def test_variables_are_no_longer_than_a_history_takes(settings: Settings) -> None:
    """Each of these characters is six in JSON."""
    first = Env(variables=(("A", "\1" * 30_000),))
    most = Env(variables=(("B", "$A"),))
    assert plan(settings, asked(first))
    with pytest.raises(ImageStepError, match=r"variables of 36.* bytes, as they are kept"):
        plan(settings, asked(first, most))


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
    assert run.name == "step 3: RUN make"
    assert run.made == (MadeDirectory("/a", ""), MadeDirectory("/a/b", ""))
    assert end.made == (MadeDirectory("/c", "web"), MadeDirectory("/c", ""))
    values = values_of(asked(*steps), run)
    assert (values["make.1.directory"], values["make.2.directory"]) == ("/a", "/a/b")
    assert (values["make.1.owner"], values["workdir"]) == ("", "/a/b")
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


def of_e2b(*steps: ImageStep, **more: Any) -> RunStepsInput:
    return asked(*steps, meaning=Meaning.E2B, **more)


def values(settings: Settings, build: RunStepsInput) -> list[dict[str, str]]:
    return [values_of(build, work) for work in plan(settings, build)]


E2B_USER = MadeUser("user", is_made=True, has_sudo=True)


def test_to_e2b_a_step_finds_the_user_that_it_is_run_as(settings: Settings) -> None:
    run, end = plan(settings, of_e2b(FIRST))
    assert run.made == (E2B_USER, MadeDirectory("/home/user", "user"))
    assert end.made == (E2B_USER, MadeDirectory("/home/user", ""))
    [run_values, end_values] = values(settings, of_e2b(FIRST))
    assert (run_values["image.user"], run_values["workdir"]) == ("user", "/home/user")
    assert run_values["start.login-shell"] == end_values["start.login-shell"] == ""
    assert end_values["ready.login-shell"] == ""
    assert not {"start.login-shell", "make.1.user"} & {*values(settings, asked(FIRST))[0]}


def test_an_inherited_command_is_run_as_in_its_base(settings: Settings) -> None:
    inherited = asked(start_command="serve", ready_command="ask", start_meaning=Meaning.E2B)
    [end] = values(settings, inherited)
    assert "start.login-shell" in end
    assert "ready.login-shell" not in end
    [end] = values(settings, of_e2b(start_command="serve", start_meaning=Meaning.DOCKER))
    assert "start.login-shell" not in end
    assert "ready.login-shell" in end


def test_users_are_made_for_e2b_alone_and_have_sudo_where_it_is_asked(settings: Settings) -> None:
    steps = (User(name="web"), User(name="app", sudo="true"), FIRST)
    [made, _] = [work.made for work in plan(settings, of_e2b(*steps))]
    assert made[2:] == (MadeUser("web", True, False), MadeUser("app", True, True))
    [made, _] = [work.made for work in plan(settings, asked(*steps))]
    assert made == (MadeUser("app", False, True),)


def test_a_copy_is_the_users_to_e2b_and_an_add_is_the_same(settings: Settings) -> None:
    add = Add(source="a", destination="b", files_sha256="0" * 64)
    owned = COPY.model_copy(update={"owner": "web"})
    copied, added, own, _ = values(settings, of_e2b(User(name="me"), COPY, add, owned))
    assert copied["copy.owner"] == added["copy.owner"] == "me"
    assert own["copy.owner"] == "web"
    assert "copy.by-e2b" in copied
    assert "copy.unpacks" not in added
    copied, added, _ = values(settings, asked(User(name="me"), COPY, add))
    assert copied["copy.owner"] == added["copy.owner"] == ""
    assert "copy.by-e2b" not in copied
    assert ["copy.unpacks" in each for each in (copied, added)] == [False, True]


def test_the_two_meanings_share_no_disk_of_a_step(settings: Settings) -> None:
    ours = {work.key for work in plan(settings, asked(FIRST, COPY))}
    assert ours.isdisjoint(work.key for work in plan(settings, of_e2b(FIRST, COPY)))


def test_variables_that_are_too_long_are_told_by_their_step(settings: Settings) -> None:
    double = Env(variables=(("A", "x$A$A"),))
    with pytest.raises(ImageStepError, match=r"^step 16: .*limit is") as error:
        plan(settings, asked(*[double] * 30))
    assert error.value.step_number == 16


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


def test_what_a_run_could_reach_is_part_of_it(settings: Settings) -> None:
    """Of a COPY it is not; and nothing to reach is as it was before there was a network."""

    def with_network(network: NetworkPolicy) -> list[str]:
        shape = asked().shape.model_copy(update={"network": network})
        return keys(settings, COPY, FIRST, SECOND, shape=shape)

    before = keys(settings, COPY, FIRST, SECOND)
    assert with_network(NO_NETWORK) == before
    online = with_network(INTERNET)
    assert [a == b for a, b in zip(before, online, strict=True)] == [True, False, False, False]
