"""Process logs: what every line says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from activities.contract.names import VmPurpose, build_workflow_id
from activities.contract.scope import BuildScope, HostLease, VmRef
from activities.process.logging import configure_logging, fields_of_activity
from activities.process.settings import Settings

BUILD = "3f0b6f53-2a3c-4f4b-9d1e-0a1b2c3d4e5f"
WORKFLOW = build_workflow_id(BUILD)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a host's process writes; logging is as before afterwards."""
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    root = logging.getLogger()
    handlers, level, configured = root.handlers, root.level, structlog.get_config()
    configure_logging(Settings(host="kvm-7"), "host")
    yield text
    root.handlers = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.configure(**configured)


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_a_line_of_a_running_activity_says_which_build_step_and_host(stderr: io.StringIO) -> None:
    fields = fields_of_activity(WORKFLOW, "pull_image", 2, None)
    with structlog.contextvars.bound_contextvars(**fields):
        structlog.get_logger("any").info("pulling")
        logging.getLogger("a library").warning("slow")
    for line in lines(stderr):
        assert line["build_id"] == BUILD
        assert (line["step"], line["activity"], line["attempt"]) == ("pull_image", "pull_image", 2)
        assert (line["process"], line["host"]) == ("host", "kvm-7")


def test_a_line_of_the_sdk_has_the_same_fields(stderr: io.StringIO) -> None:
    about = {"workflow_id": WORKFLOW, "activity_type": "snapshot_vm", "attempt": 3}
    logging.getLogger("temporalio.activity").warning(
        "Completing activity as failed", extra={"temporal_activity": about}
    )
    logging.getLogger("temporalio.workflow").warning(
        "something", extra={"temporal_workflow": {"workflow_id": WORKFLOW}}
    )
    of_activity, of_workflow = lines(stderr)
    assert (of_activity["build_id"], of_activity["step"]) == (BUILD, "boot_and_snapshot")
    assert (of_activity["host"], of_activity["attempt"]) == ("kvm-7", 3)
    assert (of_workflow["build_id"], of_workflow["workflow_id"]) == (BUILD, WORKFLOW)


@pytest.mark.parametrize(
    ("purpose", "step"), [(VmPurpose.BOOT, "boot_and_snapshot"), (VmPurpose.VERIFY, "verify")]
)
def test_a_vms_activities_belong_to_the_step_that_it_is_for(purpose: VmPurpose, step: str) -> None:
    scope = BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h", number=1))
    vm = VmRef(scope=scope, purpose=purpose)
    assert fields_of_activity(WORKFLOW, "kill_vm", 1, vm)["step"] == step


def test_what_belongs_to_no_build_claims_none() -> None:
    assert fields_of_activity("sweep-host-h1", "sweep_host", 1, None) == {
        "workflow_id": "sweep-host-h1",
        "activity": "sweep_host",
        "attempt": 1,
    }


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_text_of_a_line_steers_the_operators_terminal(
    stderr: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    log_format: Literal["json", "console"],
) -> None:
    monkeypatch.setattr("sys.stderr", stderr)  # pytest has put its own there since the fixture
    configure_logging(Settings(log_format=log_format), "host")
    evil = "a\x1b]52;c;ZXZpbA==\x07\x9b2J\u202e\rb"
    structlog.get_logger("any").warning(evil, error=evil)
    try:
        raise ValueError(evil)
    except ValueError:
        logging.getLogger("a library").exception(evil)
    written = stderr.getvalue()
    assert written.count("]52;c;") >= 4
    assert all(c == "\n" or c.isprintable() for c in written)
