"""An agent in a template of the whole product, by the bench: that must go on to run."""

from __future__ import annotations

from pathlib import Path

import agent_bench
import pytest

pytestmark = [pytest.mark.counts_host, pytest.mark.whole, pytest.mark.timeout(600)]


def test_after_each_resume_the_agent_answers_its_first_request(tmp_path: Path) -> None:
    found = agent_bench.answers_of_resumes(tmp_path / "bench", 2, lambda _: None, "alpine-like")
    assert agent_bench.AS_BUILT in found and len(found) >= 2
    for answers in found.values():
        print(answers)
        assert len(answers) == 2 and all(min(answer) > 0 for answer in answers)
