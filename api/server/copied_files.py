"""The files that the COPY steps of a request take: found in the bucket before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc

from activities.contract.image_steps import Add, Copy
from activities.contract.requests import TemplateConfig
from activities.contract.units import MIB
from activities.process.settings import Settings
from activities.store.objects import SentFiles
from api.errors import ApiError, Violation, invalid_argument
from api.server.template_bucket import TemplateBucket

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.files import FilesContent

Found = Mapping[str, "FilesContent | None"]


class CopiedFiles:
    """Finds the files of requests."""

    def __init__(self, bucket: TemplateBucket, settings: Settings) -> None:
        self._bucket = bucket
        self._settings = settings

    async def found(self, config: TemplateConfig, scope: str = "") -> TemplateConfig:
        """Return the config with the files of each COPY by the SHA-256 of the bytes that are there.

        Without a scope that is what they are called already. Raises ApiError NOT_FOUND when its
        tenant has not sent them, INVALID_ARGUMENT when they are more than a host takes.
        """
        copies = {n: step for n, step in enumerate(config.steps) if isinstance(step, Copy | Add)}
        if not copies:
            return config
        most = self._settings.max_files_mb * MIB
        contents = {
            name: await self._bucket.files_content(
                SentFiles(name, scope), config.tenant, most_bytes=most
            )
            for name in {step.files_sha256 for step in copies.values()}
        }
        fields = {
            f"template.steps[{n}].files_hash": contents[step.files_sha256]
            for n, step in copies.items()
        }
        _require_small(fields, most)
        _require_sent(fields)
        steps = list(config.steps)
        for number, step in copies.items():
            content = contents[step.files_sha256]
            assert content is not None
            steps[number] = step.model_copy(update={"files_sha256": content.sha256})
        return config.model_copy(update={"steps": tuple(steps)})


def _require_small(fields: Found, most_bytes: int) -> None:
    large = [
        Violation(
            field, f"names files of {content.size_bytes} bytes; at most {most_bytes} are taken"
        )
        for field, content in fields.items()
        if content is not None and content.size_bytes > most_bytes
    ]
    if large:
        raise invalid_argument(large)


def _require_sent(fields: Found) -> None:
    missing = [
        Violation(field, "names files that were not sent")
        for field, content in fields.items()
        if content is None
    ]
    if missing:
        raise ApiError(
            grpc.StatusCode.NOT_FOUND,
            "FILES_NOT_FOUND",
            "files of a COPY are not in the bucket",
            hint="Send them first (InitLayerFileUpload), in the same cache_scope.",
            violations=missing,
        )
