"""A Temporal dev server of the test's own, beside the program that pip has installed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import timedelta

from devstack.services import ONE_SHARD, dynamic_config
from temporalio.common import SearchAttributeKey
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

STARTUP = timedelta(seconds=60)  # as the dev stack gives a service; of itself the SDK gives five


async def start_temporal(
    *,
    search_attributes: Sequence[SearchAttributeKey[str]] = (),
    database: str | None = None,
    port: int | None = None,
    config: Sequence[str] = (),
) -> WorkflowEnvironment:
    """Start a server that knows these search attributes; use it as a context manager.

    With a `database` (a file), the next server on that file goes on where this one ended. `config`
    is dynamic config, `name=value`.
    """
    return await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=shutil.which("temporal"),
        search_attributes=search_attributes,
        dev_server_database_filename=database,
        port=port,
        dev_server_extra_args=dynamic_config(*ONE_SHARD, *config),
        dev_server_startup_timeout=STARTUP,
    )
