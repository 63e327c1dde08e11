"""After each attack the host is as it was, and another caller's build beside it was built."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support import neighbour as neighbours
from tests.support.neighbour import Neighbour
from tests.support.undisturbed import dockerd_that_answers, host_as_before


@pytest.fixture(scope="session")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    """Another caller, who has not begun yet."""
    made = Neighbour(tmp_path_factory.mktemp(neighbours.DIRECTORY, numbered=False))
    yield made
    made.end()


@pytest.fixture
def undisturbed(
    request: pytest.FixtureRequest, tmp_path: Path, neighbour: Neighbour
) -> Iterator[None]:
    """Have the host as it was before, once a test's own fixtures have cleaned up."""
    docker = dockerd_that_answers() if _has_dockerd(request.node) else nullcontext()
    with docker, host_as_before(tmp_path):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have another caller's build beside the attack. Nothing of it is there when fixtures count."""
    if not isinstance(item, pytest.Function) or not _has_neighbour(item):
        return (yield)
    beside = item.funcargs["neighbour"]
    assert isinstance(beside, Neighbour)
    with beside.building():
        return (yield)


def _has_neighbour(item: pytest.Function) -> bool:
    """Whether there is one beside it: in the short form beside the first of each module."""
    if "undisturbed" not in item.fixturenames or not _has_dockerd(item):
        return False
    first = next(each for each in item.session.items if each.path == item.path)
    return item is first or _is_whole(item)


def _has_dockerd(item: pytest.Item) -> bool:
    return _is_whole(item) or item.get_closest_marker("counts_nothing") is None


def _is_whole(item: pytest.Item) -> bool:
    return bool(item.config.getoption("--whole"))
