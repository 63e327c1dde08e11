"""The whole product with its REST API, for E2B's SDK."""

from __future__ import annotations

from collections.abc import Iterator

import images
import pytest
from devstack.ports import free_port

from tests.support.real_stack import Product, running_product


@pytest.fixture(scope="session")
def product() -> Iterator[Product]:
    metrics, health = free_port(), free_port()
    with running_product() as running:
        running.stack.start_app(
            "rest",
            TEMPLATE_MANAGER_METRICS_ADDRESS=f"127.0.0.1:{metrics}",
            TEMPLATE_MANAGER_HEALTH_ADDRESS=f"127.0.0.1:{health}",
        )
        running.metrics.append(f"http://127.0.0.1:{metrics}/metrics")
        running.health.append(f"127.0.0.1:{health}")
        yield running


@pytest.fixture(scope="session")
def image(product: Product) -> str:
    """A small image with a shell and accounts."""
    return images.make_and_push("alpine-like", product.registry, lambda _: None)
