"""What a build says of the image's own command, of its init and its health check."""

from __future__ import annotations

from pathlib import Path

import pytest

from activities.contract.errors import StartCommandError
from activities.contract.inputs import BuildRootfsInput
from activities.contract.results import ImageConfig
from activities.contract.scope import BuildScope, HostLease
from activities.rootfs.guest_files import stage_request
from activities.rootfs.image_look import Look
from activities.rootfs.rootfs import unstarted, unused_health_check
from tests.support.example_template import BUILD, pulled_image

SCOPE = BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h1", number=1))


def asked(config: ImageConfig, ready_command: str = "") -> BuildRootfsInput:
    return BuildRootfsInput(
        scope=SCOPE,
        image=pulled_image().model_copy(update={"config": config}),
        disk_size_mb=64,
        memory_mb=512,
        start_command="image",
        ready_command=ready_command,
        env={},
        ready_timeout_seconds=1,
        provision_timeout_seconds=1,
    )


def staged(place: Path, words: tuple[str, ...], init_word: int | None) -> list[str]:
    look = Look("0 0 - ", "/", "systemd", "/lib/systemd/systemd", True, init_word=init_word)
    return stage_request(place, asked(ImageConfig(cmd=words)), look)


def test_what_an_image_would_start_is_told() -> None:
    told = unstarted(ImageConfig(entrypoint=("/bin/run it",), cmd=("-f",)))
    assert "start command `image` is: '/bin/run it' -f" in told


def test_an_image_without_a_command_is_told() -> None:
    assert "the image has none" in unstarted(ImageConfig())
    assert "the image has none" in unstarted(ImageConfig(entrypoint=("",)))


def test_a_command_that_is_the_init_starts_nothing_beside_it(tmp_path: Path) -> None:
    for words in (("/sbin/init",), ("/bin/sh", "-c", "exec /sbin/init")):
        assert staged(tmp_path, words, 0) == []
    assert not (tmp_path / "start.argv").exists()


def test_arguments_of_the_init_are_told_not_used(tmp_path: Path) -> None:
    [told] = staged(tmp_path, ("/sbin/init", "--unit=a b"), 0)
    assert "its arguments are not used: '--unit=a b'" in told


def test_a_program_that_starts_the_init_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StartCommandError) as refused:
        staged(tmp_path, ("/entrypoint", "/sbin/init"), 1)
    assert "starts its init by another program: /entrypoint /sbin/init" in refused.value.message
    assert "/lib/systemd/systemd" in refused.value.message
    assert "--start-command" in refused.value.hint


def test_any_other_command_is_started(tmp_path: Path) -> None:
    assert staged(tmp_path, ("/bin/serve", "a b"), None) == []
    assert (tmp_path / "start.argv").read_bytes() == b"/bin/serve\0a b\0"


@pytest.mark.parametrize(
    ("test", "line"),
    [
        (("CMD-SHELL", "curl -f localhost || exit 1"), "curl -f localhost || exit 1"),
        (("CMD", "/bin/check it", "-q"), "'/bin/check it' -q"),
    ],
)
def test_a_health_check_is_told_where_there_is_no_ready_command(
    test: tuple[str, ...], line: str
) -> None:
    config = ImageConfig(healthcheck=test)
    [told] = unused_health_check(asked(config))
    assert told.endswith(f"HEALTHCHECK is not taken for one: {line}")
    assert unused_health_check(asked(config, ready_command="true")) == []


@pytest.mark.parametrize("test", [(), ("NONE",), ("CMD",), ("CMD-SHELL",)])
def test_no_health_check_is_not_told(test: tuple[str, ...]) -> None:
    assert unused_health_check(asked(ImageConfig(healthcheck=test))) == []
