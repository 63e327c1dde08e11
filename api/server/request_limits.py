"""How large each field of each request may be, and that moments are some: checked of the message,
before anything reads it.

A field that is not named here has DEFAULT_CHARS, or DEFAULT_ENTRIES. What a field means is checked
where that is known (`validation`, `listing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from activities.contract.network_policy import MAX_ALLOWED
from activities.contract.registry_logins import MAX_SECRET_CHARS
from activities.contract.requests import MAX_IMAGE_STEPS
from api.errors import Violation, invalid_argument
from api.server.validation import (
    MAX_COMMAND_CHARS,
    MAX_ENV_CHARS,
    MAX_IMAGE_CHARS,
    MAX_STEP_ARGUMENTS,
)

DEFAULT_CHARS = 256
DEFAULT_ENTRIES = 16
# Temporal's own, in base64; it opens no other than its own.
MAX_PAGE_TOKEN_CHARS = 8_192
MAX_ENV_ENTRIES = 1_000

# By message and field, as in the proto file.
CHARS: Mapping[str, int] = {
    "AwsRegistry.aws_secret_access_key": MAX_SECRET_CHARS,
    "AwsRegistry.aws_access_key_id": MAX_SECRET_CHARS,
    "GcpRegistry.service_account_json": MAX_SECRET_CHARS,
    "GeneralRegistry.username": MAX_SECRET_CHARS,
    "GeneralRegistry.password": MAX_SECRET_CHARS,
    "TemplateBuildListRequest.page_token": MAX_PAGE_TOKEN_CHARS,
    "TemplateConfig.env": MAX_ENV_CHARS,
    "TemplateConfig.from_image": MAX_IMAGE_CHARS,
    "TemplateConfig.ready_command": MAX_COMMAND_CHARS,
    "TemplateConfig.secret_env": MAX_SECRET_CHARS,
    "TemplateConfig.start_command": MAX_COMMAND_CHARS,
    "TemplateStep.args": MAX_COMMAND_CHARS,
}
ENTRIES: Mapping[str, int] = {
    "TemplateConfig.env": MAX_ENV_ENTRIES,
    "TemplateConfig.secret_env": 100,
    "TemplateConfig.steps": MAX_IMAGE_STEPS,
    "TemplateNetwork.allowed": MAX_ALLOWED,
    "TemplateStep.args": MAX_STEP_ARGUMENTS,
}


def most_chars(field: FieldDescriptor) -> int:
    """Return how many characters a text of this field may have; of a map, name and value."""
    return CHARS.get(_name(field), DEFAULT_CHARS)


def most_entries(field: FieldDescriptor) -> int:
    """Return how often this repeated field, or map, may be there."""
    return ENTRIES.get(_name(field), DEFAULT_ENTRIES)


def require_within_limits(request: Message) -> None:
    """Raise ApiError INVALID_ARGUMENT with every field that is too large: its size and limit."""
    violations = list(_too_large(request, ""))
    if violations:
        raise invalid_argument(violations)


def _too_large(message: Message, path: str) -> Iterator[Violation]:
    for field, value in message.ListFields():
        here = f"{path}{field.name}"
        if _is_map(field):
            yield from _too_many(field, here, len(value))
            for key in sorted(value):
                yield from _too_long(field, f"{here}[{key[:64]!r}]", key + value[key])
        elif field.is_repeated:
            yield from _too_many(field, here, len(value))
            for number, each in enumerate(value):
                yield from _of_value(field, f"{here}[{number}]", each)
        else:
            yield from _of_value(field, here, value)


def _of_value(
    field: FieldDescriptor, path: str, value: Message | str | float
) -> Iterator[Violation]:
    if isinstance(value, Timestamp):
        yield from _out_of_range(path, value)
    elif isinstance(value, Message):
        yield from _too_large(value, f"{path}.")
    elif isinstance(value, str):
        yield from _too_long(field, path, value)


def _out_of_range(path: str, moment: Timestamp) -> Iterator[Violation]:
    try:
        moment.ToJsonString()
    except ValueError:
        yield Violation(path, "must be between the years 1 and 9999")


def _too_long(field: FieldDescriptor, path: str, text: str) -> Iterator[Violation]:
    most = most_chars(field)
    if len(text) > most:
        yield Violation(path, f"has {len(text)} characters; at most {most} are allowed")


def _too_many(field: FieldDescriptor, path: str, count: int) -> Iterator[Violation]:
    most = most_entries(field)
    if count > most:
        yield Violation(path, f"has {count} entries; at most {most} are allowed")


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def _name(field: FieldDescriptor) -> str:
    return field.full_name  # the service has no package
