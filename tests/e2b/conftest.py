"""The whole product with its REST API, for E2B's SDK."""

from __future__ import annotations

from collections.abc import Iterator

import images
import pytest
from devstack.stack import ALL_APPS

from tests.support.real_stack import Product, running_product


@pytest.fixture(scope="session")
def product() -> Iterator[Product]:
    with running_product(ALL_APPS) as running:
        yield running


@pytest.fixture(scope="session")
def image(product: Product) -> str:
    """A small image with a shell and accounts."""
    return images.make_and_push("alpine-like", product.registry, lambda _: None)
