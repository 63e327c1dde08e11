"""Credentials for a registry: given with the request, of a cloud, or of this host's Docker."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
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

GOOGLE_READS = "https://www.googleapis.com/auth/cloud-platform.read-only"
GOOGLE_DELETES = "https://www.googleapis.com/auth/cloud-platform"
AWS_LIMITS = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})


@dataclass(frozen=True)
class HostLogins:
    """The host's own credentials, for the registries to which an operator lends them."""

    lent_to: Callable[[ImageReference], bool]
    google_scope: str = GOOGLE_READS

    def of_docker(self, reference: ImageReference) -> Credentials | None:
        """Return what `docker login` has left on this host; None where it is not lent."""
        return _from_docker_config(reference) if self.lent_to(reference) else None

    def of_google(self, reference: ImageReference) -> Credentials:
        """Return a token of the host's Google account. Raises RegistryAuthError."""
        if not self.lent_to(reference):
            raise RegistryAuthError(
                f"this host's own Google credentials are not for {reference.name}",
                hint="Give a service account's key, or let an operator name the registry in "
                "TEMPLATE_MANAGER_HOST_LOGIN_REGISTRIES.",
            )
        return Credentials("oauth2accesstoken", _google_access_token(self.google_scope))


def credentials_for(
    reference: ImageReference,
    login: RegistryLogin | None,
    open_secret: Callable[[Sealed], str],
    host: HostLogins,
) -> Credentials | None:
    """Return user and password for an image's registry; None is to ask without.

    Blocking: the clouds are asked for a token. Raises RegistryAuthError, RegistryUnavailableError
    when AWS cannot be reached, and what `open_secret` raises.
    """
    match login:
        case None:
            return host.of_docker(reference)
        case PasswordLogin():
            return Credentials(login.username, open_secret(login.secret))
        case GoogleKeyLogin():
            key = open_secret(login.secret)
            return Credentials("_json_key_base64", base64.b64encode(key.encode()).decode())
        case GoogleDefaultLogin():
            return host.of_google(reference)
        case AwsLogin():
            return _ecr_token(login, open_secret(login.secret))
        case _:
            assert_never(login)


def _from_docker_config(reference: ImageReference) -> Credentials | None:
    try:
        known = docker.auth.load_config().resolve_authconfig(reference.registry)
    except docker.errors.DockerException:
        return None
    if not known or not known.get("username"):
        return None
    return Credentials(str(known["username"]), str(known.get("password", "")))


def _google_access_token(scope: str) -> str:
    try:
        credentials, _ = google.auth.default(scopes=[scope])
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
