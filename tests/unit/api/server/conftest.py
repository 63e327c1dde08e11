"""Outside of an admitted call nobody sees anything: these tests are calls where all may do all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.server.access import ANONYMOUS, current_caller


@pytest.fixture(autouse=True)
def anonymous() -> Iterator[None]:
    mark = current_caller.set(ANONYMOUS)
    yield
    current_caller.reset(mark)
