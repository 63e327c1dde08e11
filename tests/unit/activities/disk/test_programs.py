"""What the programs that a host starts find in their environment."""

from __future__ import annotations

import pytest

from activities.disk.programs import child_environment


def test_nothing_of_ours_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATE_MANAGER_SECRET_KEYS", "k1:secret")
    monkeypatch.setenv("PATH", "/opt/bin")
    assert child_environment() == {"PATH": "/opt/bin", "LC_ALL": "C.UTF-8"}
