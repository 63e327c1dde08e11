"""After each attack the host is as it was; beside the first of a module another caller builds."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.neighbour import neighbour_that_builds
from tests.support.undisturbed import dockerd_that_answers, host_as_before


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Have the host as it was before, once a test's own fixtures have cleaned up."""
    docker = dockerd_that_answers() if _counts_host(request.node) else nullcontext()
    with docker, host_as_before(tmp_path):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have another caller's build beside the first attack of each module that has `undisturbed`.

    Nothing of it is there when fixtures count.
    """
    if not isinstance(item, pytest.Function) or not _has_neighbour(item):
        return (yield)
    with neighbour_that_builds(Path(str(item.funcargs["tmp_path"])) / "neighbour"):
        return (yield)


def _has_neighbour(item: pytest.Function) -> bool:
    if "undisturbed" not in item.fixturenames or not _counts_host(item):
        return False
    return item is next(each for each in item.session.items if each.path == item.path)


def _counts_host(item: pytest.Item) -> bool:
    """Whether it has a dockerd."""
    return item.get_closest_marker("counts_nothing") is None
