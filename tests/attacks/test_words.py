"""What a guest says reaches terminals and the Web UI's Markdown as text, and ends its own build."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import images
import pytest
from markdown_it import MarkdownIt
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import WorkflowFailureError

from activities.contract.names import build_workflow_id
from tests.support.command_line import on_terminal
from tests.support.neighbour import Neighbour
from tests.support.real_stack import Product, nothing_left, running_product

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

SHOWN = "what is left is shown"
# To the program's own output, which is relayed, and as root to the console itself.
HOSTILE = (
    r"\033]52;c;ZXZpbA==\007\033]0;owned\033\\\033[2J\033[31m\302\2332J\342\200\256"
    r"<img src=x onerror=alert(1)> [a](http://evil.example) ![a](http://evil.example/a.png) "
    r"``` http://evil.example [link=http://evil.example]b[/link] "
)
SAY_AND_END = (
    f"printf '{HOSTILE}{SHOWN}\\n'; printf '{HOSTILE}{SHOWN}\\n' >&2; "
    rf"printf '\n{HOSTILE}\n@tm@ start-exit abc\n@tm@ ready-attempt 1e9 -\n@tm@ \n' >/dev/ttyS0; "
    rf"printf '\n@tm@ start-exit 99999999999999999999\n@tm@ ready-attempt 7 7 7\n' >/dev/ttyS0; "
    rf"printf '\n@tm@ err {HOSTILE}{SHOWN}\n\n@tm@ failed {HOSTILE}{SHOWN}\n' >/dev/ttyS0; sleep 60"
)
# What the command line writes itself: colours.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def product() -> Iterator[Product]:
    with running_product() as running:
        yield running


@pytest.fixture(scope="module")
def failed(product: Product, neighbour: Neighbour) -> Iterator[tuple[str, dict[str, Any]]]:
    """A build whose guest says all of this beside another caller's build, and its status."""
    image = images.make_and_push("busybox", product.registry, lambda _: None)
    with nothing_left(product):
        with neighbour.building():
            build_id = product.build(image, start=SAY_AND_END, ready="/bin/busybox false")
            status = product.ended(build_id)
        yield build_id, status
        assert product.cli("delete", build_id).code == 0


def require_text(output: str) -> None:
    """Require that nothing in it steers a terminal, but for colours."""
    rest = COLOURS.sub("", output)
    wrong = {c for c in rest if not (c.isprintable() or c in "\r\n\t")}
    assert wrong == set(), rest


def test_a_forged_line_ends_the_liars_build_by_a_typed_error(
    product: Product, failed: tuple[str, dict[str, Any]]
) -> None:
    build_id, status = failed
    assert status["state"] == "failed"
    assert status["reason"]["error_type"] == "StartCommandError"
    boots = [row for row in status["timeline"] if row["step"] == "boot_and_snapshot"]
    assert len(boots) == 1
    assert SHOWN in status["reason"]["message"]
    assert any(SHOWN in line for line in status["reason"]["log_tail"])
    for line in (status["reason"]["message"], *status["reason"]["log_tail"]):
        require_text(line)
        assert "]52;" not in line
    assert any(SHOWN in line for line in product.log(build_id))


def test_the_liars_slot_is_free_again(product: Product, failed: tuple[str, dict[str, Any]]) -> None:
    build_id, _ = failed
    deadline = time.monotonic() + 120
    while build_id in (held := held_slots(product)):
        assert time.monotonic() < deadline, held
        time.sleep(0.5)
    assert held == []


def held_slots(product: Product) -> list[str]:
    """Return the builds that take a slot of the host, as the host tells."""
    [told] = [told for told in product.cli("hosts", "--json").json["hosts"].values() if told]
    assert told["slots"] > 0
    return [str(build_id) for build_id in told["builds"]]


@pytest.mark.parametrize("command", ["logs", "status"])
async def test_a_terminal_is_shown_text(
    product: Product, failed: tuple[str, dict[str, Any]], command: str
) -> None:
    build_id, _ = failed
    code, output = await on_terminal(command, build_id, columns=120, env=product.stack.variables)
    assert code == 0
    assert SHOWN in " ".join(output.split())
    assert "\x1b" in output  # it took this for a terminal
    require_text(output)


def test_a_line_of_json_is_one_line(product: Product, failed: tuple[str, dict[str, Any]]) -> None:
    build_id, _ = failed
    output = product.cli("logs", build_id, "--json").out
    assert output.isascii()
    assert all(json.loads(line)["message"] is not None for line in output.splitlines())


def test_the_web_ui_shows_text(product: Product, failed: tuple[str, dict[str, Any]]) -> None:
    build_id, _ = failed
    details, failure = asyncio.run(told_by_temporal(product, build_id))
    assert SHOWN in details
    assert SHOWN in failure
    reader = MarkdownIt("gfm-like", {"html": True})
    tokens = [
        inner for token in reader.parse(details) for inner in (token, *(token.children or ()))
    ]
    assert not {token.type for token in tokens} & {
        "link_open",
        "image",
        "html_inline",
        "html_block",
    }
    for text in (details, failure):
        require_text(text)


async def told_by_temporal(product: Product, build_id: str) -> tuple[str, str]:
    """Return a build's current details (Markdown) and the message of its failure."""
    handle = (await product.temporal()).get_workflow_handle(build_workflow_id(build_id))
    metadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    with pytest.raises(WorkflowFailureError) as failure:
        await handle.result()
    return metadata.current_details, str(failure.value.cause)


def test_the_processes_logs_are_text(product: Product, failed: tuple[str, dict[str, Any]]) -> None:
    for process in ("api", "worker", "host"):
        text = product.stack.environment.files(process).log.read_text()
        require_text(text)
