"""Where a build is, in E2B's words."""

from __future__ import annotations

import pytest

from activities.contract.names import Step
from activities.contract.status import LogEntry, LogLevel
from activities.process.clock import utc_now
from api.server.wire import log_message


@pytest.mark.parametrize(
    ("step", "number", "told"),
    [
        (Step.LEASE, None, "base"),
        (Step.PULL, None, "base"),
        (Step.ROOTFS, None, "base"),
        (Step.ROOTFS, 1, "1"),
        (Step.ROOTFS, 12, "12"),
        (Step.BOOT, None, "finalize"),
        (Step.VERIFY, None, "finalize"),
        (Step.UPLOAD, None, "finalize"),
        (Step.RELEASE, None, "finalize"),
    ],
)
def test_a_line_says_its_step_as_e2b_s_clients_read_it(
    step: Step, number: int | None, told: str
) -> None:
    line = LogEntry(
        timestamp=utc_now(), level=LogLevel.INFO, message="x", step=step, step_number=number
    )
    assert dict(log_message(line).fields) == {"step": told, "pipeline_step": str(step)}
