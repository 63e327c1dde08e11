"""The file that says that a process is ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from activities.process.ready_file import shown_as_ready
from activities.process.settings import Settings


def test_the_file_is_there_while_the_process_serves(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with shown_as_ready(Settings(ready_file=ready)):
        assert ready.exists()
    assert not ready.exists()


def test_a_process_that_fails_is_not_ready_any_more(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with pytest.raises(RuntimeError), shown_as_ready(Settings(ready_file=ready)):
        raise RuntimeError
    assert not ready.exists()


def test_nothing_is_written_when_nobody_asks_for_it(tmp_path: Path) -> None:
    with shown_as_ready(Settings(data_dir=tmp_path)):
        assert list(tmp_path.iterdir()) == []
