"""The command line as a user calls it: a process, its output and its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import uuid
from datetime import date, timedelta
from pathlib import Path

import pytest

from activities.contract.errors import StartCommandError
from activities.contract.image_reference import ImageReference
from activities.contract.status import LogLevel
from activities.process.sealing import SealedFor, Sealer
from activities.store.bucket import Bucket
from activities.store.objects import metadata_name
from tests.support.command_line import cli, on_terminal, started
from tests.support.example_template import metadata
from tests.support.running_api import Api, publish, serving

pytestmark = pytest.mark.counts_nothing

BUILD = ("build", "--image", "127.0.0.1:5000/web:1", "--start-command", "serve")


async def test_a_build_is_followed_and_ends_with_all_about_it(api: Api) -> None:
    build_id = str(uuid.uuid4())
    api.ids.append(build_id)
    ended = await cli(*BUILD, "--build-id", build_id, "--follow", *at(api))
    assert ended.code == 0, ended.err
    assert "lease_host: started" in ended.out
    assert "build is completed" in ended.out
    for told in (build_id, "sha256:aaaa", "build_rootfs", "memfile", "gs://bucket/", "/workflows/"):
        assert told in ended.out


async def test_a_build_without_a_source_starts_nothing(api: Api) -> None:
    ended = await cli("build", *at(api))
    assert (ended.code, ended.out) == (2, "")
    assert "--image" in ended.err
    assert api.journal.calls == []


async def test_the_services_own_image_is_asked_for_by_name(api: Api) -> None:
    build_id = str(uuid.uuid4())
    api.ids.append(build_id)
    ids = ("--template-id", "web", "--build-id", build_id)
    ended = await cli("build", "--own-image", *ids, "--follow", *at(api))
    assert ended.code == 0, ended.err
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.image == f"{api.settings.registry}/web:{build_id}"


async def test_without_follow_it_prints_the_id_and_leaves(api: Api) -> None:
    ended = await cli(*BUILD, *at(api))
    assert ended.code == 0
    build_id = ended.out.strip()
    api.ids.append(build_id)
    assert str(uuid.UUID(build_id)) == build_id
    status = await cli("status", build_id, "--json", *at(api))
    assert status.json["build_id"] == build_id


async def test_json_has_what_programs_need(api: Api) -> None:
    build_id = await api.completed()
    status = (await cli("status", build_id, "--json", *at(api))).json
    assert status["state"] == "completed"
    assert all(row["seconds"] >= 0 for row in status["timeline"])
    assert {artifact["name"] for artifact in status["artifacts"]} == {
        "rootfs.ext4",
        "memfile",
        "snapfile",
    }
    lines = (await cli("logs", build_id, "--json", *at(api))).out.splitlines()
    assert [json.loads(line)["next_cursor"] for line in lines] == list(range(1, len(lines) + 1))


async def test_a_failed_build_exits_1_and_says_what_to_do(api: Api) -> None:
    api.journal.fail("wait_until_ready", StartCommandError("exit code 127", log_tail=["not found"]))
    ended = await cli(*BUILD, "--follow", *at(api))
    assert ended.code == 1
    for told in ("exit code 127", "StartCommandError", "not found", "→ Run the command"):
        assert told in ended.out


async def test_wrong_values_exit_2_and_name_the_options(api: Api) -> None:
    ended = await cli(*BUILD, "--memory", "511", "--vcpu", "3", "--template-id", "A_B", *at(api))
    assert ended.code == 2
    for told in ("--memory: is 511", "--vcpu: is 3", "--template-id: must be", "→ "):
        assert told in ended.err


async def test_a_failed_build_is_listed_and_retried(api: Api) -> None:
    template_id = f"t-{uuid.uuid4().hex[:8]}"
    api.journal.fail("start_vm", StartCommandError("exit code 127"))
    created = await api.client.create(api.template(template_id=template_id))
    await api.ended(created.build_id)
    async with asyncio.timeout(40):  # visibility lags behind
        while (
            created.build_id
            not in (
                listed := await cli(
                    "list", "--state", "failed", "--template-id", template_id, *at(api)
                )
            ).out
        ):
            await asyncio.sleep(0.1)
    assert "failed" in listed.out
    again = await cli("retry", created.build_id, "--follow", *at(api))
    assert again.code == 0, again.err
    assert "reused from an earlier run" in again.out
    assert (await cli("retry", created.build_id, *at(api))).code == 2


async def test_list_knows_time(api: Api) -> None:
    build_id = await api.completed()
    today, tomorrow = date.today(), date.today() + timedelta(days=1)

    async def listed(*options: str) -> bool:
        ended = await cli("list", *options, "--json", *at(api))
        assert ended.code == 0, ended.err
        return build_id in [build["build_id"] for build in ended.json["builds"]]

    async with asyncio.timeout(20):  # visibility comes a little later
        while not await listed("--since", str(today - timedelta(days=1))):
            pass
    assert not await listed("--since", f"{tomorrow}T00:00:00")
    assert not await listed("--until", str(today - timedelta(days=1)))
    assert await listed("--until", f"{tomorrow}T00:00:00")
    assert (await cli("list", "--since", "yesterday", *at(api))).code == 2


async def test_an_unknown_build_exits_2(api: Api) -> None:
    for command in ("status", "logs", "cancel", "delete"):
        ended = await cli(command, str(uuid.uuid4()), *at(api))
        assert (ended.code, "there is no build" in ended.err) == (2, True)
    ended = await cli("status", "no/id/nor name", "--json", *at(api))
    assert ended.code == 2
    assert ended.json["error"]["reason"] == "INVALID_REQUEST"


async def test_names_are_given_moved_listed_pulled_and_taken_away(
    api: Api, empty_bucket: Bucket, tmp_path: Path
) -> None:
    build_id = await api.completed()
    told = metadata(build_id)
    empty_bucket.write_object(metadata_name(build_id), told.model_dump_json().encode())
    tagged = await cli("tag", build_id, "web:candidate", *at(api))
    assert (tagged.code, tagged.out) == (0, f"web:candidate is {build_id}\n"), tagged.err
    promoted = await cli("tag", "web:candidate", "web", "--json", *at(api))
    assert [tag["tag"] for tag in promoted.json["tags"]] == ["candidate", "default"]
    listed = await cli("names", *at(api))
    assert [line.split("\t")[:3] for line in listed.out.splitlines()] == [
        ["web:candidate", build_id, "web"],
        ["web:default", build_id, "web"],
    ]
    assert (await cli("status", "web", "--json", *at(api))).json["state"] == "completed"
    env = {"STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"]}
    place = ("--bucket", empty_bucket.name)
    for written, said in (("web", build_id), ("web:none", "there is no template web:none")):
        pulled = await cli("pull", written, str(tmp_path / "out"), *place, env=env)
        assert pulled.code != 0  # of its objects there is but the metadata
        assert said in pulled.err
    back = await cli("tag", "--roll-back", "web:candidate", *at(api))
    assert (back.code, "has stood for no other build" in back.err) == (2, True)
    assert "→ Let it stand for a build that you name." in back.err
    removed = await cli("tag", "--remove", "web:candidate", *at(api))
    assert (removed.code, removed.out) == (0, "web:candidate is gone\n")
    assert (await cli("tag", "web:candidate", *at(api))).code == 2
    assert (await cli("names", *at(api))).out.startswith("web:default\t")


async def test_an_absent_api_exits_3() -> None:
    ended = await cli("status", str(uuid.uuid4()), "--api-address", "127.0.0.1:1")
    assert ended.code == 3
    assert "template-manager api" in ended.err


async def test_cancel_and_delete(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    assert (await cli("cancel", build_id, *at(api))).out == f"{build_id} cancelled\n"
    status = (await cli("status", build_id, "--json", *at(api))).json
    assert (status["state"], status["reason"]["message"]) == ("cancelled", "cancelled")
    assert (await cli("delete", build_id, *at(api))).code == 0
    assert (await cli("delete", build_id, *at(api))).code == 0
    assert (await cli("status", build_id, *at(api))).code == 2


async def test_interrupting_a_follower_leaves_the_build_alone(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    await publish(api.temporal, build_id, "now!", level=LogLevel.INFO)
    process = await started("logs", build_id, "-f", *at(api))
    assert process.stdout is not None
    async with asyncio.timeout(40):
        while b"now!" not in await process.stdout.readline():
            pass
    process.send_signal(signal.SIGINT)
    assert await ended_with(process) == 130
    assert (await api.client.status(build_id)).state == "building"


async def ended_with(process: asyncio.subprocess.Process) -> int:
    """Wait for the exit code; a process that hangs tells where it does."""
    try:
        return await asyncio.wait_for(process.wait(), 30)
    except TimeoutError:
        process.send_signal(signal.SIGABRT)
        _, told = await process.communicate()
        raise AssertionError(told.decode()) from None


async def test_a_password_is_read_from_standard_input(api: Api) -> None:
    arguments = ("--registry-user", "me", "--registry-password-stdin", "--follow")
    ended = await cli(*BUILD, *arguments, *at(api), stdin="hunter2\n")
    assert ended.code == 0, ended.err
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.auth.username == "me"
    only_for = SealedFor(pull.scope.build_id, ImageReference.parse(pull.image).registry)
    assert Sealer(api.settings.secret_keys).open(pull.auth.secret, only_for) == "hunter2"


async def test_the_shell_completes_the_ids_of_builds_that_fit(api: Api) -> None:
    done = await api.completed()
    api.journal.fail("start_vm", StartCommandError("exit code 127"))
    failed = (await api.client.create(api.template())).build_id
    await api.ended(failed)
    async with asyncio.timeout(40):  # visibility lags behind
        while not {done, failed} <= await completed_by_shell(api, "status", ""):
            await asyncio.sleep(0.1)
    assert failed in await completed_by_shell(api, "retry", failed[:4])
    assert done not in await completed_by_shell(api, "retry", "")
    pulled = await completed_by_shell(api, "pull", "")
    assert (done in pulled, failed in pulled) == (True, False)


async def completed_by_shell(api: Api, command: str, word: str) -> set[str]:
    """What bash is offered for the first argument of a command."""
    typed = f"template-manager {command} {word}"
    ended = await cli(
        env={
            "_TEMPLATE_MANAGER_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": "2",
            "TEMPLATE_MANAGER_API_ADDRESS": api.server.address,
        },
    )
    return {line.split("\t")[0] for line in ended.out.splitlines()}


@pytest.mark.parametrize("columns", [40, 120])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
async def test_a_build_is_followed_on_every_terminal(api: Api, columns: int, encoding: str) -> None:
    api.journal.fail("wait_until_ready", StartCommandError("größe", log_tail=["→ not found"]))
    code, shown = await on_terminal(
        *BUILD, *at(api), columns=columns, env={"PYTHONIOENCODING": encoding}
    )
    assert code == 1
    assert "Traceback" not in shown
    assert shown.isascii() is (encoding == "ascii")
    words = " ".join(shown.split())
    for told in ("build_rootfs", "StartCommandError", "not found", "Run the command in a"):
        assert told in words


async def test_a_failure_is_told_once_by_who_follows(api: Api) -> None:
    error = StartCommandError("exit code 127", log_tail=["not found"])
    api.journal.fail("wait_until_ready", error)
    ended = await cli(*BUILD, "--follow", *at(api))
    assert ended.out.count("exit code 127") == 1
    assert ended.out.count("Run the command in a container") == 1


async def test_a_list_in_a_pipe_has_whole_values(api: Api) -> None:
    template_id = f"t-{uuid.uuid4().hex}-{'x' * 20}"
    build_id = await api.completed(template_id=template_id)
    async with asyncio.timeout(40):
        while not (listed := await cli("list", "--template-id", template_id, *at(api))).out:
            await asyncio.sleep(0.1)
    [line] = listed.out.splitlines()
    assert line.split("\t")[:3] == [build_id, "completed", template_id]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "--state", "done"], "--state: done: use building"),
        (["list", "--template-id", "A_B"], "--template-id: must be"),
        ([*BUILD, "--env", "1A=b"], "--env 1A: the name must be"),
        ([*BUILD, "--ready-timeout", "999999"], "--ready-timeout: is 999999"),
        ([*BUILD, "--disk", "99999999"], "--disk: is 99999999"),
        (["build", "--image", "A b"], "--image: is not an image reference"),
        (["build", "--from-template", "X"], "--from-template: must be a build's id, a UUID, or"),
    ],
)
async def test_a_refused_value_is_named_by_its_option(
    api: Api, arguments: list[str], told: str
) -> None:
    ended = await cli(*arguments, *at(api))
    assert (ended.code, told in ended.err) == (2, True), ended.err
    assert re.findall(r"\b[a-z]+_[a-z]+\b", ended.err) == []  # no field of the API


async def test_the_api_process_serves_drains_and_ends(api: Api, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = await started(
        "api",
        "--listen",
        "127.0.0.1:15908",
        env={
            "TEMPORAL_ADDRESS": str(api.temporal.service_client.config.target_host),
            "TEMPLATE_MANAGER_READY_FILE": str(ready),
        },
    )
    async with asyncio.timeout(40):
        while not ready.exists():
            await asyncio.sleep(0.05)
    await serving("127.0.0.1:15908", True)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    assert not ready.exists()


async def test_the_api_process_refuses_an_open_door() -> None:
    ended = await cli("api", "--listen", "0.0.0.0:15909")
    assert ended.code == 2
    assert "--insecure" in ended.err


@pytest.mark.parametrize("command", ["worker", "host"])
async def test_a_process_without_temporal_says_so(command: str) -> None:
    ended = await cli(command, env={"TEMPORAL_ADDRESS": "127.0.0.1:1"})
    assert ended.code == 3
    assert "TEMPORAL_ADDRESS" in ended.err


def at(api: Api) -> tuple[str, str]:
    """The option that leads to the running API."""
    return ("--api-address", api.server.address)


@pytest.mark.parametrize(("command", "code"), [("--help", 0), ("no-such-command", 2)])
async def test_threads_of_temporals_sdk_do_not_take_part_in_the_end(
    command: str, code: int
) -> None:
    """Some call into Python while it ends, and abort it: the process leaves without them."""
    script = (
        "import atexit, sys, threading, time, temporalio.client; from api.cli.main import main; "
        "threading.Thread(target=time.sleep, args=(60,)).start(); "
        "atexit.register(print, 'last words'); "
        f"sys.argv = ['template-manager', {command!r}]; main()"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 40)
    assert process.returncode == code
    assert out.decode().endswith("last words\n")
