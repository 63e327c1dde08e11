"""What the command line shows, and how it ends."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from api.cli.build_request import (
    OptionError,
    RegistryOptions,
    environment_of,
    registry_of,
    template_id_of,
)
from api.cli.console import Exit, exit_code_of
from api.cli.json_output import error_json, status_json
from api.cli.live_view import StepsDisplay, view_for
from api.cli.main import app
from api.cli.report import (
    build_table,
    duration,
    error_text,
    failure_text,
    log_line,
    workflow_address,
)
from api.client.client import CallError
from api.errors import Violation
from api.pb import template_manager_pb2 as pb

BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
MIB = 1024 * 1024
runner = CliRunner()


def at(seconds: float) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=seconds))
    return moment


@pytest.fixture
def local_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets a test say in which time zone this machine is."""

    def be_in(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield be_in
    monkeypatch.undo()
    time.tzset()


def shown(thing: RenderableType, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(thing)
    return file.getvalue()


def completed() -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=BUILD,
        status=pb.Completed,
        state="completed",
        step="release_host",
        host="h1",
        image_digest="sha256:" + "a" * 64,
        timeline=[
            pb.StepTimeline(step="pull_image", started=at(0), ended=at(1.5), outcome="done"),
            pb.StepTimeline(
                step="build_rootfs", started=at(1.5), ended=at(2), outcome="done", reused=True
            ),
        ],
        artifacts=[pb.Artifact(name="memfile", size_bytes=512 * MIB, sent_bytes=40 * MIB)],
        workflow_id=f"template-build-{BUILD}",
        run_id="run-1",
        bucket="templates",
    )


def running() -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=BUILD,
        state="building",
        step="upload",
        timeline=[
            pb.StepTimeline(step="pull_image", started=at(0), ended=at(1), outcome="done"),
            pb.StepTimeline(step="upload", started=at(1), outcome="running"),
        ],
        progress=pb.BuildProgress(
            what="upload memfile",
            done=10 * MIB,
            total=40 * MIB,
            unit="bytes",
            attempt=2,
            last_failure="503",
        ),
    )


def failed() -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=BUILD,
        status=pb.Failed,
        state="failed",
        reason=pb.TemplateBuildStatusReason(
            message="exit code [127]",
            step="finalize",
            pipeline_step="boot_and_snapshot",
            error_type="StartCommandError",
            hint="Run it in a container.",
            log_tail=["sh: [red]serve[/red]: not found"],
        ),
    )


def test_a_finished_build_is_told_with_all_that_it_left() -> None:
    text = shown(build_table(completed()))
    for told in (
        BUILD,
        "sha256:aaa",
        "1.5 s",
        "reused",
        "40.0 MiB sent",
        "of 512.0 MiB",
        f"gs://templates/{BUILD}/",
    ):
        assert told in text
    assert workflow_address("http://ui.test", completed()) == (
        f"http://ui.test/namespaces/default/workflows/template-build-{BUILD}/run-1"
    )


def test_a_running_build_is_told_with_its_progress() -> None:
    text = shown(build_table(running()))
    assert "upload memfile · 10.0/40.0 MiB · attempt 2 · last failure: 503" in text


def test_speed_and_time_left_are_those_that_the_host_tells() -> None:
    status = running()
    status.progress.per_second = 5 * MIB
    told = "upload memfile · 10.0/40.0 MiB · 5.0 MiB/s · 6.0 s left · attempt 2"
    assert told in shown(build_table(status))
    display = StepsDisplay()
    display.update(status)
    assert "10.0/40.0 MiB 5.0 MiB/s 6.0 s left" in shown(display)
    assert told in " ".join(shown(display, width=40).split())


def waiting() -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(
        build_id=BUILD,
        state="building",
        step="lease_host",
        timeline=[pb.StepTimeline(step="lease_host", started=at(0), outcome="running")],
        waiting=pb.WaitingForHost(
            why=pb.AllBusy,
            message="all slots are taken: it goes on when a build ends",
            builds_before=1,
            hosts=pb.HostSlots(hosts=3, slots=6, draining=1, away=1),
        ),
    )


def test_a_waiting_build_tells_its_place_the_hosts_and_why() -> None:
    told = (
        "1 build is before it · 3 hosts, 6 slots: 0 free, 1 draining, 1 more away · "
        "all slots are taken: it goes on when a build ends"
    )
    assert told in shown(build_table(waiting()), width=200)
    display = StepsDisplay()
    display.update(waiting())
    for width in (40, 200):
        assert told in " ".join(shown(display, width).split())
    waits = status_json(waiting())["waiting"]
    assert waits is not None and (waits["why"], waits["builds_before"]) == ("AllBusy", 1)


def test_plain_lines_tell_what_a_build_waits_for_when_that_changes() -> None:
    file = io.StringIO()
    view = view_for(Console(file=file, width=200))
    status = waiting()
    for before in (1, 1, 0):
        status.waiting.builds_before = before
        view.status(status)
    view.status(running())
    lines = file.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        "waiting for a host: 1 build is before it",
        "waiting for a host: 0 builds are before it",
    ]


def test_a_failure_is_told_with_its_last_lines_as_they_are() -> None:
    text = shown(failure_text(failed()))
    assert "build failed in boot_and_snapshot: exit code [127] (StartCommandError)" in text
    assert "│ sh: [red]serve[/red]: not found" in text
    assert "→ Run it in a container." in text


def test_json_is_plain_data_with_stable_names() -> None:
    data = status_json(completed())
    assert data["build_id"] == BUILD
    assert [row["seconds"] for row in data["timeline"]] == [1.5, 0.5]
    assert data["artifacts"][0]["sent_bytes"] == 40 * MIB
    assert (data["reason"], data["progress"]) == (None, None)
    assert status_json(running())["timeline"][1]["seconds"] is None
    reason = status_json(failed())["reason"]
    assert reason is not None and reason["error_type"] == "StartCommandError"


def test_the_live_view_has_one_line_per_step() -> None:
    display = StepsDisplay()
    display.update(running())
    lines = shown(display).splitlines()
    assert [line.split()[1] for line in lines] == [
        "lease_host",
        "pull_image",
        "build_rootfs",
        "boot_and_snapshot",
        "verify",
        "upload",
        "release_host",
    ]
    assert "✓ pull_image" in lines[1]
    assert "10.0/40.0 MiB" in lines[5]
    assert "attempt 2" in lines[5]


def test_the_live_view_shows_what_it_is_told() -> None:
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True)
    with view_for(console) as view:
        assert view.status_seconds == 1
        view.status(running())
        view.line(pb.TemplateBuildLogsResponse(entry=pb.TemplateBuildLogEntry(message="hello")))
    assert "hello" in file.getvalue()
    assert "10.0/40.0 MiB" in file.getvalue()


@pytest.mark.parametrize(
    ("zone", "clock"),
    [("UTC", "03:04:05Z"), ("CET-1", "04:04:05+01:00"), ("PST8", "19:04:05-08:00")],
)
def test_a_log_line_names_its_step_and_a_bad_level(
    zone: str, clock: str, local_zone: Callable[[str], None]
) -> None:
    local_zone(zone)
    entry = pb.TemplateBuildLogEntry(
        timestamp=at(0),
        message="[bold]x",
        level=pb.Warn,
        fields={"step": "base", "pipeline_step": "pull_image"},
    )
    assert shown(log_line(entry)).rstrip() == f"{clock} pull_image        WARN [bold]x"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (65, "1 min 05 s"), (7260, "2 h 01 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_error_is_told_by_the_names_of_the_options() -> None:
    error = CallError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "many things",
        reason="INVALID_REQUEST",
        hint="Correct them.",
        violations=(
            Violation("template.memory_mb", "is 1"),
            Violation("template.team_id", "no"),
            Violation("template.env['A-B']", "letters"),
        ),
    )
    text = shown(error_text(error))
    assert "--memory: is 1" in text
    assert "template.team_id: no" in text  # it has no option
    assert "--env A-B: letters" in text
    assert "→ Correct them." in text
    assert error_json(error)["error"]["fields"]["template.memory_mb"] == "is 1"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Exit.USAGE),
        (grpc.StatusCode.NOT_FOUND, Exit.USAGE),
        (grpc.StatusCode.ALREADY_EXISTS, Exit.USAGE),
        (grpc.StatusCode.FAILED_PRECONDITION, Exit.USAGE),
        (grpc.StatusCode.UNAVAILABLE, Exit.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Exit.UNAVAILABLE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Exit.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL, Exit.UNAVAILABLE),
    ],
)
def test_the_exit_code_says_whose_turn_it_is(code: grpc.StatusCode, expected: Exit) -> None:
    assert exit_code_of(CallError(code, "")) == expected


def commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined] # it is a group


@pytest.mark.parametrize("command", commands())
def test_every_command_has_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert re.search(rf"Example: (\S+=\S+ )?template-manager\s+{command}", result.output)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("template-manager li", {"list"}),
        ("template-manager build --ready-c", {"--ready-command"}),
        ("template-manager list --state c", {"cancelling", "completed", "cancelled"}),
        ("template-manager logs --level w", {"warn"}),
        ("template-manager token ci --right re", {"read"}),
        ("template-manager status --api-address 127.0.0.1:1 4", set()),  # nothing answers there
    ],
)
def test_the_shell_completes_commands_options_and_values(typed: str, offered: set[str]) -> None:
    environment = {
        "_TEMPLATE_MANAGER_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    result = runner.invoke(app, [], prog_name="template-manager", env=environment)
    assert set(result.output.split()) == offered


def test_help_documents_the_exit_codes() -> None:
    help_text = " ".join(runner.invoke(app, ["--help"]).output.split())
    assert "Exit codes: 0 success; 1 the build failed" in help_text


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["status"], ["build", "--memory", "much"], ["logs", "x", "--level", "y"]],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


# ---- Options


@pytest.mark.parametrize(
    ("image", "template_id"),
    [
        ("127.0.0.1:5000/demo/busybox:latest", "busybox"),
        ("registry.test/My_App.x@sha256:" + "a" * 64, "my-app-x"),
        ("debian", "debian"),
        ("", "template"),
    ],
)
def test_a_template_is_named_after_its_image(image: str, template_id: str) -> None:
    assert template_id_of(image) == template_id


def test_environment_is_given_or_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "there")
    assert environment_of(["A=1=2", "B=", "HERE"]) == {"A": "1=2", "B": "", "HERE": "there"}
    with pytest.raises(OptionError, match="NOWHERE"):
        environment_of(["NOWHERE"])
    with pytest.raises(OptionError, match="--env =x: write --env NAME=VALUE"):
        environment_of(["=x"])


def test_credentials_come_from_files_and_the_environment(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    from_file = registry_of(RegistryOptions(user="me", password_file=secret), {})
    assert from_file is not None and from_file.general.password == "hunter2"
    variable = {"TEMPLATE_MANAGER_REGISTRY_PASSWORD": "hunter3"}
    from_variable = registry_of(RegistryOptions(user="me"), variable)
    assert from_variable is not None and from_variable.general.password == "hunter3"
    default = registry_of(RegistryOptions(google_default=True), {})
    assert default is not None and default.WhichOneof("type") == "gcp"
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s"}
    ecr = registry_of(RegistryOptions(aws_region="eu-central-1"), keys)
    assert ecr is not None and ecr.aws.aws_secret_access_key == "s"
    assert registry_of(RegistryOptions(), variable) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (RegistryOptions(user="me"), "--registry-password-stdin"),
        (RegistryOptions(user="me", google_default=True), "one kind"),
        (RegistryOptions(password_file=Path("x")), "--registry-user"),
        (RegistryOptions(aws_region="eu-central-1"), "AWS_SECRET_ACCESS_KEY"),
        (RegistryOptions(google_key_file=Path("/nonexistent")), "cannot read"),
        # For the server an empty key is the host's own credentials.
        (RegistryOptions(google_key_file=Path("/dev/null")), "/dev/null is empty"),
        (RegistryOptions(google_key_file=Path("/dev/zero")), "more than 65536 characters"),
        (RegistryOptions(user="me", password_file=Path("/dev/zero")), "more than 65536"),
    ],
)
def test_half_given_credentials_are_refused(options: RegistryOptions, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        registry_of(options, {})


def test_small_files_are_not_told_as_nothing() -> None:
    status = completed()
    status.artifacts.append(pb.Artifact(name="snapfile", size_bytes=19149, sent_bytes=19149))
    text = " ".join(shown(build_table(status)).split())
    assert "snapfile 18.7 KiB sent of 18.7 KiB" in text
    assert "memfile 40.0 MiB sent of 512.0 MiB" in text


def test_a_cancelled_build_is_told_once() -> None:
    reason = pb.TemplateBuildStatusReason(
        message="cancelled",
        pipeline_step="lease_host",
        error_type="BuildCancelledError",
        hint="Again.",
    )
    status = pb.TemplateBuildStatusResponse(state="cancelled", reason=reason)
    assert shown(failure_text(status)) == "build cancelled in lease_host\n→ Again.\n"


@pytest.mark.parametrize(
    ("source", "bar"),
    [("start command", "│ "), ("RUN", "│ "), ("console", "│ "), ("guest", ""), (None, "")],
)
def test_what_a_program_says_is_told_apart_from_our_own_words(source: str | None, bar: str) -> None:
    fields = {"source": source} if source else {}
    entry = pb.TemplateBuildLogEntry(message="guest is ready", fields=fields)
    assert log_line(entry).plain.endswith(f" {bar}guest is ready")
    assert ("│" in log_line(entry).plain) is bool(bar)
