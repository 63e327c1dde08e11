from __future__ import annotations

from pathlib import Path

import firecracker_versions
import pytest
from firecracker_versions import NOTHING, checks_of, outcome, table


def report(place: Path, **counts: int) -> Path:
    path = place / "report.xml"
    told = " ".join(f'{name}="{count}"' for name, count in counts.items())
    path.write_text(f"<testsuites><testsuite {told}/></testsuites>")
    return path


@pytest.mark.parametrize(
    ("counts", "code", "told"),
    [
        ({"tests": 4, "skipped": 0, "failures": 0, "errors": 0}, 0, "passed (4)"),
        ({"tests": 4, "skipped": 1, "failures": 0, "errors": 0}, 0, "NOT SHOWN (1 of 4 skipped)"),
        ({"tests": 4, "skipped": 1, "failures": 1, "errors": 1}, 1, "FAILED (2 of 4)"),
        ({"tests": 4, "skipped": 4, "failures": 0, "errors": 0}, 0, "NOT SHOWN (4 of 4 skipped)"),
        ({"tests": 0, "skipped": 0, "failures": 0, "errors": 0}, 5, "FAILED (0 of 0)"),
    ],
)
def test_what_was_skipped_was_not_shown(
    tmp_path: Path, counts: dict[str, int], code: int, told: str
) -> None:
    assert outcome(report(tmp_path, **counts), code) == told


def test_a_pytest_that_was_killed_has_failed(tmp_path: Path) -> None:
    empty = tmp_path / "report.xml"
    empty.touch()
    assert outcome(empty, -9) == "FAILED (exit code -9)"


def test_versions_and_checks_are_a_table() -> None:
    rows = {"v1.16.1": ["passed (3), 9 s", "FAILED (1 of 2), 70 s"], "v1.13.1": ["x", "y"]}
    shown = table(("API", "build"), rows).splitlines()
    assert shown[1].split() == ["Firecracker", "API", "build"]
    assert shown[2].startswith("v1.16.1      passed (3), 9 s  FAILED")
    assert "not shown on the real one" in shown[-1]


def test_without_a_binary_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FIRECRACKER_BINARY", raising=False)
    assert firecracker_versions.main([]) == 2
    assert NOTHING in capsys.readouterr().err


def test_a_build_in_the_jailer_is_shown_where_there_is_one() -> None:
    assert checks_of(is_jailed=True, is_short=True) == ("jailed build",)
    assert checks_of(is_jailed=False, is_short=True) == ("build",)
    assert "jailed build" in checks_of(is_jailed=True, is_short=False)
    assert "jailed build" not in checks_of(is_jailed=False, is_short=False)
