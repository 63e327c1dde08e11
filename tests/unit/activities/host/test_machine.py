from __future__ import annotations

import os

from activities.host.machine import first_processor, tell_machine

CPUINFO = """\
processor\t: 0
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz
power management:
flags\t\t: fpu vme

processor\t: 1
model\t\t: 86
"""


def test_the_first_processor_counts() -> None:
    told = first_processor(CPUINFO)
    assert (told["cpu family"], told["model"], told["power management"]) == ("6", "85", "")
    assert told["model name"] == "Intel(R) Xeon(R) CPU @ 2.20GHz"


def test_this_machine_is_told() -> None:
    told = tell_machine()
    assert told.cpu_architecture == os.uname().machine
    assert told.cpu_count >= 1
    assert told.cpu_flags
    assert 0 < told.memory_used_bytes < told.memory_total_bytes
    assert 0 <= told.cpu_percent <= 100
