"""What an attack leaves of the host is looked at when a test's own fixtures have cleaned up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.undisturbed import dockerd_that_answers, host_as_before


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Have the host as it was before; a test that counts nothing of it may have no dockerd."""
    counts_nothing = request.node.get_closest_marker("counts_nothing")
    docker = nullcontext() if counts_nothing else dockerd_that_answers()
    with docker, host_as_before(tmp_path):
        yield
