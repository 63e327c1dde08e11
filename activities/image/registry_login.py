"""Credentials for a registry: given with the request, of a cloud, or of this host's Docker."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import assert_never

import botocore.exceptions
import botocore.session
import docker.auth
import docker.errors
import google.auth
import google.auth.exceptions
import google.auth.transport.requests
from botocore.config import Config

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

GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
AWS_LIMITS = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})


def credentials_of(login: RegistryLogin, open_secret: Callable[[Sealed], str]) -> Credentials:
    """Return user and password for a registry. Blocking: the clouds are asked for a token.

    Raises RegistryAuthError, RegistryUnavailableError when AWS cannot be reached, and what
    `open_secret` raises.
    """
    match login:
        case PasswordLogin():
            return Credentials(login.username, open_secret(login.secret))
        case GoogleKeyLogin():
            key = open_secret(login.secret)
            return Credentials("_json_key_base64", base64.b64encode(key.encode()).decode())
        case GoogleDefaultLogin():
            return Credentials("oauth2accesstoken", _google_access_token())
        case AwsLogin():
            return _ecr_token(login, open_secret(login.secret))
        case _:
            assert_never(login)


def from_docker_config(reference: ImageReference) -> Credentials | None:
    """Return what `docker login` has left on this host for the registry."""
    try:
        known = docker.auth.load_config().resolve_authconfig(reference.registry)
    except docker.errors.DockerException:
        return None
    if not known or not known.get("username"):
        return None
    return Credentials(str(known["username"]), str(known.get("password", "")))


def _google_access_token() -> str:
    try:
        credentials, _ = google.auth.default(scopes=[GOOGLE_SCOPE])
        request = google.auth.transport.requests.Request()
        credentials.refresh(request)  # type: ignore[no-untyped-call]  # no types in google-auth
    except google.auth.exceptions.GoogleAuthError as error:
        raise RegistryAuthError(
            f"this host has no usable Google default credentials: {error}"
        ) from None
    return str(credentials.token)


def _ecr_token(login: AwsLogin, secret_access_key: str) -> Credentials:
    """Ask ECR for a password (`ecr:GetAuthorizationToken`); it is good for twelve hours."""
    try:
        client = botocore.session.Session().create_client(
            "ecr",
            region_name=login.region,
            aws_access_key_id=login.access_key_id,
            aws_secret_access_key=secret_access_key,
            config=AWS_LIMITS,
        )
        answer = client.get_authorization_token()
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        raise RegistryAuthError(
            f"AWS gives no password for ECR in {login.region}: {code}",
            hint="Check the access key, its region, and that it may ecr:GetAuthorizationToken.",
        ) from None
    except botocore.exceptions.BotoCoreError as error:
        raise RegistryUnavailableError(
            f"AWS cannot be asked for a password for ECR in {login.region}: {type(error).__name__}"
        ) from None
    token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
    username, _, password = token.partition(":")
    return Credentials(username, password)
