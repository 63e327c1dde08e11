from __future__ import annotations

from activities.process.processor import first_processor

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
