"""What attacks are made with: a registry for hostile images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from devstack.registry import Registry, running_registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An empty registry that wants no login."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
