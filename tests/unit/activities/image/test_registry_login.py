from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from activities.contract.errors import RegistryAuthError, RegistryUnavailableError
from activities.contract.registry_logins import AwsLogin, GoogleKeyLogin, PasswordLogin, Sealed
from activities.image.registry import Credentials
from activities.image.registry_login import credentials_of
from tests.support.fake_ecr import running_ecr

SEALED = Sealed(key_id="k", token="sealed")
AWS = AwsLogin(access_key_id="AKIAEXAMPLE", secret=SEALED, region="eu-central-1")


def opening(secret: str) -> Callable[[Sealed], str]:
    return {SEALED: secret}.__getitem__


def test_a_password_is_taken_as_it_is() -> None:
    login = PasswordLogin(username="me", secret=SEALED)
    assert credentials_of(login, opening("p:w")) == Credentials("me", "p:w")


def test_a_google_key_is_sent_as_google_wants_it() -> None:
    found = credentials_of(GoogleKeyLogin(secret=SEALED), opening('{"type": "service_account"}'))
    assert found.username == "_json_key_base64"
    assert base64.b64decode(found.password) == b'{"type": "service_account"}'


def test_aws_gives_a_password_for_a_signed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_ecr("ecr-password") as ecr:
        monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", ecr.address)
        assert credentials_of(AWS, opening("secret-key")) == Credentials("AWS", "ecr-password")
    [request] = ecr.asked
    signed = request["Authorization"]
    assert signed.startswith("AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/")
    assert "/eu-central-1/ecr/aws4_request" in signed
    assert "secret-key" not in str(request)


@pytest.mark.parametrize("code", ["UnrecognizedClientException", "AccessDeniedException"])
def test_a_refused_key_is_an_authentication_error(
    monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    with running_ecr(error=code) as ecr:
        monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", ecr.address)
        with pytest.raises(RegistryAuthError, match=code) as error:
            credentials_of(AWS, opening("secret-key"))
    assert "secret-key" not in str(error.value)
    assert not error.value.retryable


def test_aws_that_cannot_be_reached_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", "http://127.0.0.1:9")
    with pytest.raises(RegistryUnavailableError):
        credentials_of(AWS, opening("secret-key"))


def test_credentials_do_not_show_in_logs() -> None:
    assert "hidden" not in repr(Credentials("me", "hidden"))
