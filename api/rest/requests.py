"""What callers send: bodies as the SDK's models have them (e2b 2.45 to 2.63), and their limits.

Here is only checked that it has the expected form. What values may be is the gRPC API's business.
Fields that are not known are let through: newer SDKs have more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel
from starlette.requests import ClientDisconnect, Request

from api.rest.errors import RestError

MAX_TOLD_ERRORS = 5

Int32 = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=256)]


Tags = Annotated[list[str], Field(min_length=1)]


class Body(BaseModel):
    """A body. Its fields are spelled as in JavaScript."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", populate_by_name=False)


class NewBuild(Body):
    """Ask for a template's next build: its name and the size of its VM."""

    name: Name | None = None
    alias: Name | None = None
    """What `name` was called before."""
    tags: list[str] = []
    cpu_count: Int32 | None = None
    memory_mb: Annotated[Int32 | None, Field(alias="memoryMB")] = None
    min_free_disk_mb: Annotated[
        Int32 | None, Field(validation_alias=AliasChoices("minFreeDiskMb", "minFreeDiskMB"))
    ] = None


class Step(Body):
    """A step of a build."""

    type: str
    args: list[str] = []
    files_hash: str | None = None
    force: bool | None = None


class GeneralLogin(Body):
    """User and password for a registry."""

    type: Literal["registry"]
    username: str
    password: str


class AwsLogin(Body):
    """An access key for Amazon's registry."""

    type: Literal["aws"]
    aws_access_key_id: str
    aws_secret_access_key: str
    aws_region: str


class GoogleLogin(Body):
    """A service account for Google's registry."""

    type: Literal["gcp"]
    service_account_json: str


Login = Annotated[GeneralLogin | AwsLogin | GoogleLogin, Field(discriminator="type")]


class BuildStart(Body):
    """Start a build that was asked for."""

    from_image: str = ""
    from_template: str = ""
    from_image_registry: Login | None = None
    force: bool | None = None
    steps: list[Step] = []
    start_cmd: str = ""
    ready_cmd: str = ""


class TagsOfBuild(Body):
    """Let tags stand for what another stands for."""

    target: Name
    """`name:tag`."""
    tags: Tags


class TagsOfName(Body):
    """Take tags away."""

    name: Name
    tags: Tags


class Change(Body):
    """Change a template."""

    public: bool | None = None


Asked = TypeVar("Asked", bound=Body)


@dataclass(frozen=True)
class RequestLimits:
    """How large a request may be, and how long it may take to come."""

    body_bytes: int = 1 << 20
    seconds: float = 30.0
    """For its head, for its body, and for its answer to be read."""


async def body_of(request: Request, kind: type[Asked]) -> Asked:
    """Read and check a request's body, within the limits of its application. Raises RestError."""
    limits: RequestLimits = request.app.state.limits
    try:
        async with asyncio.timeout(limits.seconds):
            content = await _content(request, limits.body_bytes)
    except TimeoutError:
        told = f"the body did not come within {limits.seconds:g} s"
        raise RestError(408, "BODY_TOO_SLOW", told) from None
    except ClientDisconnect:
        raise RestError(400, "BODY_CUT_OFF", "the body did not come whole") from None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise RestError(400, "INVALID_REQUEST", _told(error)) from None


def number_in(request: Request, name: str, default: int, most: int) -> int:
    """Return a number of the query, at most `most`. Raises RestError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise RestError(400, "INVALID_REQUEST", f"{name}: must be a number, and not negative")
    return min(int(text), most)


async def _content(request: Request, most_bytes: int) -> bytes:
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most_bytes:
            told = f"the body has more than {most_bytes} bytes"
            raise RestError(413, "BODY_TOO_LARGE", told)
    return bytes(content)


def _told(error: ValidationError) -> str:
    """Say what is wrong, without what was sent: it may be a secret."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in wrong]
    return "; ".join(told[:MAX_TOLD_ERRORS])[:1_000]
