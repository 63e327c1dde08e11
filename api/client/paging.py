"""Lists that the API tells page by page, as one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from api.pb import template_manager_pb2 as pb

MAX_PAGE = 100
"""The API's own limit."""

Asked = TypeVar("Asked", pb.TemplateBuildListRequest, pb.TemplateNameListRequest)
Page = TypeVar("Page", pb.TemplateBuildListResponse, pb.TemplateNameListResponse)
Row = TypeVar("Row")


async def rows_of_pages(
    ask: Callable[[Asked], Awaitable[Page]],
    request: Asked,
    rows: Callable[[Page], Iterable[Row]],
    most: int,
) -> AsyncIterator[Row]:
    """Yield the first `most` rows of a list. Changes the request; raises what `ask` raises."""
    request.page_size = min(most, MAX_PAGE)
    while most > 0:
        page = await ask(request)
        for row in list(rows(page))[:most]:
            most -= 1
            yield row
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
