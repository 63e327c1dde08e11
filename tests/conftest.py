"""Which tests may run beside others, and the parts that tests of several folders share.

`temporal-dev/run-tests` runs two halves at once.

Unit, workflow and replay tests count nothing of the machine; modules of other folders say so, or
that they count. A test that says neither runs in the half that counts, where it harms nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from devstack.registry import Registry, running_registry
from devstack.stack import Stack
from hypothesis import settings

from activities.store.bucket import Bucket

# On a busy machine any example may take long: tests that mind the time measure it themselves.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

HERE = Path(__file__).parent
COUNT_NOTHING = ("unit", "workflows", "replay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="also run what is marked `whole`")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.path.relative_to(HERE).parts[0] in COUNT_NOTHING:
            item.add_marker(pytest.mark.counts_nothing)
    # Attacks count all containers: not beside those of what comes first in the other half.
    items.sort(
        key=lambda item: (
            item.get_closest_marker("comes_first") is None,
            item.path.relative_to(HERE).parts[0] == "attacks",
        )
    )


@pytest.fixture(scope="session")
def storage() -> Iterator[Stack]:
    """An emulated Google Cloud Storage behind the proxy that keeps its promises."""
    with Stack(only=("gcs-emulator", "gcs", "bucket")) as stack:
        yield stack


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An empty registry that wants no login."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def empty_bucket(storage: Stack, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket without any object."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.variables["STORAGE_EMULATOR_HOST"])
    bucket = Bucket(storage.environment.bucket)
    for stored in bucket.list_objects(""):
        bucket.delete_object(stored.name, stored.generation)
    return bucket
