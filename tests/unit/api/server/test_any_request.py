"""Whatever a request is, it is valid or refused with a typed error, soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from activities.contract.requests import TemplateConfig
from activities.contract.units import KIB
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from api.errors import ApiError
from api.pb import info_service_pb2
from api.pb import template_manager_pb2 as pb
from api.server.listing import list_query
from api.server.request_limits import require_within_limits
from api.server.validation import require_build_id, require_sent_files, validate
from tests.support.hostile_text import hostile_text

SETTINGS = Settings(secret_keys=SecretStr("k1:" + "A" * 43 + "="), registry="registry.test")
SEALER = Sealer(SETTINGS.secret_keys)
REQUESTS = [
    GetMessageClass(method.input_type)
    for file in (pb.DESCRIPTOR, info_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]

TEXT = st.one_of(
    st.sampled_from(["", "web", "RUN", "COPY", "ENV", "ARG", "USER", "WORKDIR", "0", "a/b:c"]),
    st.sampled_from(
        ["4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d", "a" * 64, "docker.io/library/debian:12"]
    ),
    hostile_text.map(lambda text: text.encode(errors="replace").decode()),
)
INT32 = st.one_of(st.sampled_from([0, 1, 2, 512, 1024]), st.integers(-(2**31), 2**31 - 1))
ADDRESS = st.one_of(st.ip_addresses().map(str), st.ip_addresses().map(lambda one: f"{one}/24"))
STEP = st.builds(
    pb.TemplateStep,
    type=TEXT,
    args=st.lists(TEXT, max_size=4),
    force=st.booleans(),
    files_hash=TEXT,
)
LOGIN = st.one_of(
    st.builds(
        pb.FromImageRegistry, general=st.builds(pb.GeneralRegistry, username=TEXT, password=TEXT)
    ),
    st.builds(
        pb.FromImageRegistry,
        aws=st.builds(
            pb.AwsRegistry, aws_access_key_id=TEXT, aws_secret_access_key=TEXT, aws_region=TEXT
        ),
    ),
    st.builds(pb.FromImageRegistry, gcp=st.builds(pb.GcpRegistry, service_account_json=TEXT)),
    st.builds(pb.FromImageRegistry),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "template_id": TEXT,
    "build_id": TEXT,
    "memory_mb": INT32,
    "vcpu_count": INT32,
    "disk_size_mb": INT32,
    "kernel_version": TEXT,
    "firecracker_version": TEXT,
    "start_command": TEXT,
    "ready_command": TEXT,
    "steps": st.lists(STEP, max_size=4),
    "from_image": TEXT,
    "from_image_registry": LOGIN,
    "team_id": TEXT,
    "env": st.dictionaries(TEXT, TEXT, max_size=3),
    "secret_env": st.dictionaries(TEXT, TEXT, max_size=3),
    "ready_timeout_seconds": st.integers(0, 2**32 - 1),
    "priority": INT32,
    "name": TEXT,
    "tags": st.lists(TEXT, max_size=3),
    "network": st.builds(
        pb.TemplateNetwork, access=INT32, allowed=st.lists(st.one_of(ADDRESS, TEXT), max_size=3)
    ),
}
GOOD: dict[str, Any] = {
    "template_id": "web",
    "build_id": "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d",
    "from_image": "docker.io/library/debian:12",
    "memory_mb": 512,
    "vcpu_count": 2,
    "disk_size_mb": 1024,
}
KNOWN = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


def test_each_field_is_tried() -> None:
    untried = {"huge_pages", "force", "keep_failed", "from_template"}  # yes or no, another source
    assert {*FIELDS} | untried == {field.name for field in pb.TemplateConfig.DESCRIPTOR.fields}


@given(st.fixed_dictionaries({}, optional=FIELDS), st.booleans())
@settings(max_examples=300)
def test_any_template(fields: dict[str, Any], is_mostly_good: bool) -> None:
    template = pb.TemplateConfig(**((GOOD if is_mostly_good else {}) | fields))
    request = pb.TemplateCreateRequest(template=template)
    try:
        require_within_limits(request)
        valid = validate(request, SETTINGS, SEALER)
    except ApiError as error:
        assert error.code in KNOWN
        assert all(name.isascii() or name for name, _ in error.trailers())
        assert sum(len(value) for _, value in error.trailers()) < 6 * 1024  # gRPC takes 8 KiB
        return
    kept = TemplateConfig.model_validate_json(valid.config.model_dump_json())
    assert kept == valid.config


@given(st.binary(max_size=300))
@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_any_bytes(kind: Any, data: bytes) -> None:
    try:
        require_within_limits(kind.FromString(data))
    except (DecodeError, ApiError):
        return


@given(TEXT, st.lists(TEXT, max_size=3), st.integers(-(2**40), 2**40))
def test_any_list_filter(template_id: str, states: list[str], seconds: int) -> None:
    request = pb.TemplateBuildListRequest(template_id=template_id, states=states)
    request.started_after.seconds = seconds
    try:
        require_within_limits(request)
        query = list_query(request)
    except ApiError as error:
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        return
    assert query.count("'") % 2 == 0
    assert query.isascii()


@given(TEXT)
def test_any_id_and_hash(text: str) -> None:
    files = pb.InitLayerFileUploadRequest(template_id=text, hash=text)
    checks: list[Callable[[], str]] = [
        lambda: require_build_id(text),
        lambda: require_sent_files(files).hash,
    ]
    for check in checks:
        try:
            assert check().isascii()
        except ApiError as error:
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "text", ["x", "/", "a/", "-", "a-", "a.", ":", "@", "\0", "\u202e"], ids=ascii
)
def test_the_largest_request_is_answered_soon(text: str) -> None:
    long = text * (32_000 // len(text))
    template = pb.TemplateConfig(
        template_id=long,
        build_id=long,
        from_image=long,
        start_command=long,
        env={f"{long}{number}": long for number in range(4)},
        steps=[pb.TemplateStep(type=long, args=[long]) for _ in range(8)],
    )
    request = pb.TemplateCreateRequest(template=template)
    assert request.ByteSize() < 3 * SETTINGS.max_request_kb * KIB
    began = time.monotonic()
    for check in (require_within_limits, lambda each: validate(each, SETTINGS, SEALER)):
        with pytest.raises(ApiError):
            check(request)
    assert time.monotonic() - began < 20
