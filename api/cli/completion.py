"""What the shell offers for a value: build ids, states, levels, hosts, rights.

It is asked between two key strokes: what does not answer at once is left out, without a word.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from typer import Context  # typer reads the annotation

if TYPE_CHECKING:
    from api.pb import template_manager_pb2 as pb

T = TypeVar("T")

LIMIT_SECONDS = 1.5
MOST_BUILDS = 30
API_ADDRESS = "TEMPLATE_MANAGER_API_ADDRESS"
DEFAULT_API_ADDRESS = "127.0.0.1:5008"

Offer = tuple[str, str]
"""A value, and what it is."""

STATES = ("building", "cancelling", "completed", "failed", "cancelled")
LEVELS = ("debug", "info", "warn", "error")
RIGHTS = ("read", "build", "admin", "operator")


def one_of(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a completion by a fixed choice."""

    def offered(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return offered


def builds(*states: str) -> Callable[[Context, str], Iterator[Offer]]:
    """Return a completion by the ids of the latest builds in these states; none: in all."""

    def offered(ctx: Context, incomplete: str) -> Iterator[Offer]:
        # `pull` reads the bucket and has no such option: its ids are the API's all the same.
        address = ctx.params.get("api_address") or os.environ.get(API_ADDRESS, DEFAULT_API_ADDRESS)
        for build in _at_once(_latest(str(address), states)):
            if build.build_id.startswith(incomplete):
                yield build.build_id, f"{build.state} {build.template_id}"

    return offered


def hosts(incomplete: str) -> list[str]:
    """Offer the hosts that have ever started."""
    return [name for name in _at_once(_host_names()) if name.startswith(incomplete)]


async def _latest(address: str, states: Sequence[str]) -> Sequence[pb.TemplateBuildSummary]:
    from api.client.client import TemplateClient
    from api.pb import template_manager_pb2 as pb

    request = pb.TemplateBuildListRequest(states=states, page_size=MOST_BUILDS)
    async with TemplateClient(address) as client:
        return (await client.list_builds(request)).builds


async def _host_names() -> Sequence[str]:
    from activities.process.sweep_schedule import swept_hosts
    from activities.process.temporal import connect

    return await swept_hosts(await connect("template-manager"))


def _at_once(work: Coroutine[None, None, Sequence[T]]) -> Sequence[T]:
    try:
        return asyncio.run(asyncio.wait_for(work, LIMIT_SECONDS))
    except Exception:  # a shell that is asked for a word must not get an error
        return ()
