from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from activities.contract.errors import RegistryAuthError, RegistryUnavailableError
from activities.contract.image_reference import ImageReference
from activities.contract.registry_logins import (
    AwsLogin,
    GoogleDefaultLogin,
    GoogleKeyLogin,
    PasswordLogin,
    RegistryLogin,
    Sealed,
)
from activities.image.registry import Credentials
from activities.image.registry_login import HostLogins, credentials_for
from activities.process.settings import Settings
from tests.support.fake_ecr import running_ecr

SEALED = Sealed(key_id="k", token="sealed")
REFERENCE = ImageReference.parse("registry.test/web")
LENT_NOTHING = HostLogins(lambda reference: False)
AWS = AwsLogin(access_key_id="AKIAEXAMPLE", secret=SEALED, region="eu-central-1")


def opening(secret: str) -> Callable[[Sealed], str]:
    return {SEALED: secret}.__getitem__


def asked(login: RegistryLogin | None, open_secret: Callable[[Sealed], str]) -> Credentials:
    found = credentials_for(REFERENCE, login, open_secret, LENT_NOTHING)
    assert found is not None
    return found


def test_a_password_is_taken_as_it_is() -> None:
    login = PasswordLogin(username="me", secret=SEALED)
    assert asked(login, opening("p:w")) == Credentials("me", "p:w")


def test_a_google_key_is_sent_as_google_wants_it() -> None:
    found = asked(GoogleKeyLogin(secret=SEALED), opening('{"type": "service_account"}'))
    assert found.username == "_json_key_base64"
    assert base64.b64decode(found.password) == b'{"type": "service_account"}'


def test_aws_gives_a_password_for_a_signed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_ecr("ecr-password") as ecr:
        monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", ecr.address)
        assert asked(AWS, opening("secret-key")) == Credentials("AWS", "ecr-password")
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
            asked(AWS, opening("secret-key"))
    assert "secret-key" not in str(error.value)
    assert not error.value.retryable


def test_aws_that_cannot_be_reached_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", "http://127.0.0.1:9")
    with pytest.raises(RegistryUnavailableError):
        asked(AWS, opening("secret-key"))


def test_credentials_do_not_show_in_logs() -> None:
    assert "hidden" not in repr(Credentials("me", "hidden"))


# ---- The host's own credentials


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Default credentials of this host; which scopes are asked of them."""
    scopes: list[list[str]] = []

    class Account:
        token = "a-token-of-the-host"

        def refresh(self, request: object) -> None:
            """It is fresh."""

    def default(*, scopes: list[str], asked: list[list[str]] = scopes) -> tuple[Account, str]:
        asked.append(scopes)
        return Account(), "project"

    monkeypatch.setattr("google.auth.default", default)
    return scopes


def test_the_hosts_google_account_is_lent_where_a_setting_says_and_reads_only(
    google: list[list[str]],
) -> None:
    lent = HostLogins(Settings(host_login_registries=("registry.test",)).lends_host_login_to)
    found = credentials_for(REFERENCE, GoogleDefaultLogin(), opening(""), lent)
    assert found == Credentials("oauth2accesstoken", "a-token-of-the-host")
    assert google == [["https://www.googleapis.com/auth/cloud-platform.read-only"]]


def test_no_other_registry_gets_it(google: list[list[str]]) -> None:
    with pytest.raises(RegistryAuthError, match=r"not for registry\.test/web") as error:
        asked(GoogleDefaultLogin(), opening(""))
    assert "TEMPLATE_MANAGER_HOST_LOGIN_REGISTRIES" in error.value.hint
    assert not google


@pytest.mark.parametrize("lent", [True, False])
def test_docker_login_is_lent_likewise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: bool
) -> None:
    entry = {"auth": base64.b64encode(b"me:secret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.test": entry}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    found = credentials_for(REFERENCE, None, opening(""), HostLogins(lambda reference: lent))
    assert found == (Credentials("me", "secret") if lent else None)
