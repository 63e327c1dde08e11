"""Each field of each request has a limit, and an error that says its size and the limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from activities.contract.units import KIB
from activities.process.settings import Settings
from api.errors import ApiError
from api.pb import info_service_pb2
from api.pb import template_manager_pb2 as pb
from api.server.request_limits import (
    CHARS,
    DEFAULT_CHARS,
    ENTRIES,
    most_chars,
    most_entries,
    require_within_limits,
)

SERVICES = [
    service
    for file in (pb.DESCRIPTOR, info_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
]
REQUESTS = [method.input_type for service in SERVICES for method in service.methods]


def fields_of(
    kind: Descriptor, path: tuple[FieldDescriptor, ...] = ()
) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Yield the way to each field of a message that has a size, through the messages in it."""
    for field in kind.fields:
        inner = field.message_type
        is_map = inner is not None and inner.GetOptions().map_entry
        if is_map or field.is_repeated or field.type == field.TYPE_STRING:
            yield (*path, field)
        if inner is not None and not is_map:
            yield from fields_of(inner, (*path, field))


CASES = [
    pytest.param(kind, way, id=f"{kind.name}.{'.'.join(field.name for field in way)}")
    for kind in {kind.full_name: kind for kind in REQUESTS}.values()
    for way in fields_of(kind)
]


def request_with(kind: Descriptor, way: tuple[FieldDescriptor, ...], value: Any) -> Message:
    """Return a request in which the last field of `way` has this value."""
    request = GetMessageClass(kind)()
    message: Any = request
    for field in way[:-1]:
        inner = getattr(message, field.name)
        message = inner.add() if field.is_repeated else inner
    last = way[-1]
    if last.message_type is not None and last.message_type.GetOptions().map_entry:
        getattr(message, last.name).update(value)
    elif last.is_repeated:
        if last.message_type is not None:
            for _ in value:
                getattr(message, last.name).add()
        else:
            getattr(message, last.name).extend(value)
    else:
        setattr(message, last.name, value)
    return request


def values_of(field: FieldDescriptor, size: int, count: int) -> Any:
    """Return a value of this field with `count` entries, of which one has `size` characters."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {f"n{number:05}": "x" * (size - 6 if number == 0 else 0) for number in range(count)}
    if field.is_repeated:
        return ["x" * (size if number == 0 else 1) for number in range(count)]
    return "x" * size


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_each_field_has_a_limit(kind: Descriptor, way: tuple[FieldDescriptor, ...]) -> None:
    field = way[-1]
    chars, entries = most_chars(field), most_entries(field)
    require_within_limits(request_with(kind, way, values_of(field, chars, 1)))
    if field.type == field.TYPE_STRING or (
        field.message_type and field.message_type.GetOptions().map_entry
    ):
        with pytest.raises(ApiError) as error:
            require_within_limits(request_with(kind, way, values_of(field, chars + 1, 1)))
        assert f"has {chars + 1} characters; at most {chars} are allowed" in error.value.message
        assert field.name in error.value.violations[0].field
    if field.is_repeated:
        require_within_limits(request_with(kind, way, values_of(field, 7, entries)))
        with pytest.raises(ApiError) as error:
            require_within_limits(request_with(kind, way, values_of(field, 7, entries + 1)))
        assert f"has {entries + 1} entries; at most {entries} are allowed" in error.value.message


MOMENTS = [
    pytest.param(kind, field, id=f"{kind.name}.{field.name}")
    for kind in {kind.full_name: kind for kind in REQUESTS}.values()
    for field in kind.fields
    if field.message_type is Timestamp.DESCRIPTOR
]


@pytest.mark.parametrize(("kind", "field"), MOMENTS)
def test_each_moment_is_one(kind: Descriptor, field: FieldDescriptor) -> None:
    def told(seconds: int, nanos: int = 0) -> list[str]:
        request: Any = GetMessageClass(kind)()
        getattr(request, field.name).CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
        try:
            require_within_limits(request)
        except ApiError as error:
            return [violation.field for violation in error.violations]
        return []

    first, last = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999
    assert not told(first)
    assert not told(last, 999_999_999)
    for seconds, nanos in [
        (first - 1, 0),
        (last + 1, 0),
        (2**63 - 1, 0),
        (-(2**63), 0),
        (0, -1),
        (0, 10**9),
        (0, 2**31 - 1),
    ]:
        assert told(seconds, nanos) == [field.name]


def test_no_limit_is_of_a_field_that_is_not_there() -> None:
    there = {field.full_name for kind in REQUESTS for way in fields_of(kind) for field in way}
    assert {*CHARS, *ENTRIES} <= there


def test_what_is_allowed_fits_into_a_request() -> None:
    """Also into the smallest that an operator may allow."""
    with pytest.raises(ValueError, match="max_request_kb"):
        Settings(max_request_kb=255)
    smallest = Settings(max_request_kb=256)
    assert max(CHARS.values()) + DEFAULT_CHARS < smallest.max_request_kb * KIB


def test_all_that_is_too_large_is_told_at_once() -> None:
    template = pb.TemplateConfig(template_id="x" * 300, start_command="x" * 40_000)
    with pytest.raises(ApiError) as error:
        require_within_limits(pb.TemplateCreateRequest(template=template, version="v" * 257))
    fields = {violation.field for violation in error.value.violations}
    assert fields == {"template.template_id", "template.start_command", "version"}
