"""Run what only real Firecracker can show, on each version that is given, and print a table.

    FIRECRACKER_BINARY=/path/to/firecracker-v1.16.1:/path/to/firecracker-v1.13.1
    JAILER_BINARY=…:…   of the same releases in the same order, if VMs shall be jailed
    GUEST_KERNEL_DIR=/path/to/a/directory/with/vmlinux.bin
    python temporal-dev/firecracker_versions.py [--short]

`--short` runs one whole build on the first version, in the jailer if there is one. Every check is a
pytest of its own, whose output is shown. The exit code is 0 when all that was run has passed, 1
when not, 2 when nothing is given.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from itertools import zip_longest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
JAILED = "jailed build"
BUILD = "tests/firecracker/test_build.py"
ON_REAL = ("-m", "real_firecracker")  # not what runs on the stand-in
# A check by what it shows, and the arguments of its pytest.
CHECKS = {
    "API": ("tests/integration/test_firecracker_api.py",),
    "VMs": (
        "tests/firecracker",
        f"--ignore={BUILD}",
        "tests/integration/test_microvm.py",
        *ON_REAL,
    ),
    "confinement": ("tests/integration/test_confinement.py", *ON_REAL),
    "build": (BUILD,),
    JAILED: (BUILD,),
}
# What is given the jailer, if there is one.
WITH_JAILER = {"VMs", "confinement", JAILED}
WITHOUT_JAILER = "real_firecracker and not jailed"
# A guest takes a minute or more to boot where KVM emulates its kernel.
TEST_SECONDS = 1800
NOTHING = (
    "NOTHING IS SHOWN ON REAL FIRECRACKER: set FIRECRACKER_BINARY (paths with `:` between them) "
    "and GUEST_KERNEL_DIR; docs/firecracker.md has more"
)
NOT_SHOWN = (
    "not shown on the real one: several vCPUs of Linux, where the given one has one CPU; "
    "images with systemd, where it is emulated"
)


def main(arguments: list[str]) -> int:
    """Run the checks on all versions; returns the exit code."""
    binaries, jailers = paths_of("FIRECRACKER_BINARY"), paths_of("JAILER_BINARY")
    if not binaries or "GUEST_KERNEL_DIR" not in os.environ:
        print(NOTHING, file=sys.stderr)
        return 2
    is_short = "--short" in arguments
    names = checks_of(is_jailed=bool(jailers), is_short=is_short)
    rows = {}
    pairs = list(zip_longest(binaries, jailers[: len(binaries)], fillvalue=""))
    for binary, jailer in pairs[:1] if is_short else pairs:
        rows[version_of(binary)] = [
            run_check(binary, jailer if name in WITH_JAILER else "", CHECKS[name]) for name in names
        ]
        print(table(names, rows), flush=True)
    return 0 if all(cell.startswith("passed") for row in rows.values() for cell in row) else 1


def checks_of(*, is_jailed: bool, is_short: bool) -> tuple[str, ...]:
    """Return the names of the checks that are run."""
    if is_short:
        return (JAILED if is_jailed else "build",)
    return tuple(name for name in CHECKS if is_jailed or name != JAILED)


def paths_of(variable: str) -> list[str]:
    """Return the paths that a variable holds, with `:` between them."""
    return [path for path in os.environ.get(variable, "").split(":") if path]


def version_of(binary: str) -> str:
    """Return what a Firecracker calls itself."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    found = re.match(r"Firecracker (\S+)", said.stdout)
    return found[1] if found else binary


def run_check(binary: str, jailer: str, what: tuple[str, ...]) -> str:
    """Run one pytest to its end; returns what the table says of it.

    What takes a jailer is not even collected where there is none: what is skipped was not shown.
    """
    if not jailer:
        what = tuple(WITHOUT_JAILER if word == ON_REAL[1] else word for word in what)
    env = {"GUEST_VCPUS": "1", **os.environ, "FIRECRACKER_BINARY": binary}
    env["JAILER_BINARY"] = jailer
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--whole",
            "--tb=short",
        ]
        command += [f"--timeout={TEST_SECONDS}", f"--junitxml={report.name}", *what]
        began = time.monotonic()
        code = subprocess.run(command, cwd=REPOSITORY, env=env, check=False).returncode
        return f"{outcome(Path(report.name), code)}, {time.monotonic() - began:.0f} s"


def outcome(report: Path, code: int) -> str:
    """Tell how a pytest ended: what was skipped was not shown."""
    try:
        suite = next(ElementTree.parse(report).iter("testsuite"))
    except (ElementTree.ParseError, StopIteration):
        return f"FAILED (exit code {code})"
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    if bad or code:
        return f"FAILED ({bad} of {total})"
    return f"NOT SHOWN ({skipped} of {total} skipped)" if skipped else f"passed ({total})"


def table(names: tuple[str, ...], rows: dict[str, list[str]]) -> str:
    """Lay versions and checks out."""
    lines = [["Firecracker", *names], *([version, *cells] for version, cells in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join(["", *shown, NOT_SHOWN])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
