"""An agent in a template of the whole product, by the bench: that must go on to run."""

from __future__ import annotations

from pathlib import Path

import agent_bench
import pytest

pytestmark = [pytest.mark.counts_host, pytest.mark.whole]


def test_after_each_resume_the_agent_answers_its_first_request(tmp_path: Path) -> None:
    found = agent_bench.answers_of_resumes(tmp_path / "bench", 3, lambda _: None)
    assert len(found) == 3
    for answers in found:
        print(answers)
        assert min(answers) > 0
