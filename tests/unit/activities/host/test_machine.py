from __future__ import annotations

import os

from activities.host.machine import tell_machine


def test_this_machine_is_told() -> None:
    told = tell_machine()
    assert told.cpu_architecture == os.uname().machine
    assert told.cpu_count >= 1
    assert told.cpu_flags
    assert 0 < told.memory_used_bytes < told.memory_total_bytes
    assert 0 <= told.cpu_percent <= 100
