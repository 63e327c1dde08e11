"""What a caller is told of a gRPC error."""

from __future__ import annotations

import json

import grpc
import pytest

from api.client.client import CallError
from api.errors import Violation
from api.rest.errors import HTTP_STATUS, RestError, error_response

OURS = {  # a bug of ours, or a call that nobody waits for any more
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DATA_LOSS,
}


def test_each_code_has_a_status_or_is_ours() -> None:
    assert {*HTTP_STATUS} | OURS == {*grpc.StatusCode}
    assert not {*HTTP_STATUS} & OURS


@pytest.mark.parametrize(
    ("code", "retry", "headers"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.2, ("1", "true")),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, (None, "false")),
        (grpc.StatusCode.UNAVAILABLE, 2.5, ("3", "true")),
        (grpc.StatusCode.NOT_FOUND, None, (None, None)),
    ],
)
def test_it_is_told_whether_to_try_again(
    code: grpc.StatusCode, retry: float | None, headers: tuple[str | None, str | None]
) -> None:
    response = error_response(CallError(code, "no", "REASON", retry_after_seconds=retry))
    told = (response.headers.get("Retry-After"), response.headers.get("Should-Retry"))
    assert told == headers
    assert json.loads(bytes(response.body)) == {
        "code": HTTP_STATUS[code],
        "message": "no",
        "error_code": "REASON",
    }


def test_bad_fields_have_the_names_of_the_request() -> None:
    violations = (
        Violation("template.vcpu_count", "a"),
        Violation("template.steps[3].files_hash", "b"),
        Violation("template.from_image_registry.aws.aws_region", "c"),
    )
    error = CallError(
        grpc.StatusCode.INVALID_ARGUMENT, "long", hint="Mend it.", violations=violations
    )
    assert json.loads(bytes(error_response(error).body))["message"] == (
        "cpuCount: a; steps[3].filesHash: b; fromImageRegistry.aws.awsRegion: c → Mend it."
    )


def test_what_is_refused_here_has_the_same_form() -> None:
    response = error_response(RestError(413, "BODY_TOO_LARGE", "large"))
    body = {"code": 413, "message": "large", "error_code": "BODY_TOO_LARGE"}
    assert (response.status_code, json.loads(bytes(response.body))) == (413, body)
