"""A clone that lacks the commit to upgrade from must not pass for one that was tested."""

from __future__ import annotations

import pytest

from tests.support.earlier_code import earlier_code

NOWHERE = "0" * 40


def test_in_ci_it_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NO UPGRADE IS TESTED"), earlier_code(NOWHERE):
        pass


def test_elsewhere_it_is_skipped_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with (
        pytest.warns(UserWarning, match="git fetch"),
        pytest.raises(pytest.skip.Exception),
        earlier_code(NOWHERE),
    ):
        pass
