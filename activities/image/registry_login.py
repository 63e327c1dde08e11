"""Credentials for a registry: given with the request, of a cloud, or of this host's Docker."""

from __future__ import annotations

import base64
from typing import Any

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
from activities.contract.requests import RegistryAuth
from activities.image.registry import Credentials

GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# Their passwords are tokens that run out: one that is refused is worth a second login.
TOKEN_KINDS = frozenset({"aws", "google_default"})
AWS_LIMITS = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})


def credentials_of(auth: RegistryAuth, secret: str) -> Credentials:
    """Return user and password for a registry. Blocking: the clouds are asked for a token.

    Raises RegistryAuthError, and RegistryUnavailableError when AWS cannot be reached.
    """
    if auth.kind == "password":
        return Credentials(auth.username, secret)
    if auth.kind == "google_key":
        return Credentials("_json_key_base64", base64.b64encode(secret.encode()).decode())
    if auth.kind == "google_default":
        return Credentials("oauth2accesstoken", _google_access_token())
    return _ecr_token(auth, secret)


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


def _ecr_token(auth: RegistryAuth, secret: str) -> Credentials:
    """Ask ECR for a password (`ecr:GetAuthorizationToken`); it is good for twelve hours."""
    try:
        client: Any = botocore.session.Session().create_client(
            "ecr",
            region_name=auth.region,
            aws_access_key_id=auth.username,
            aws_secret_access_key=secret,
            config=AWS_LIMITS,
        )
        answer = client.get_authorization_token()
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        raise RegistryAuthError(
            f"AWS gives no password for ECR in {auth.region}: {code}",
            hint="Check the access key, its region, and that it may ecr:GetAuthorizationToken.",
        ) from None
    except botocore.exceptions.BotoCoreError as error:
        raise RegistryUnavailableError(
            f"AWS cannot be asked for a password for ECR in {auth.region}: {type(error).__name__}"
        ) from None
    token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
    username, _, password = token.partition(":")
    return Credentials(username, password)
