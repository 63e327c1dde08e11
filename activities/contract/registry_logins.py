"""How to log in to the registry that holds an image: by password, by Google's or by AWS's means.

The persisted form is `PersistedLogin` for all of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from activities.contract.model import Model

MAX_SECRET_CHARS = 65_536
"""Of a password, or of a key file."""


class Sealed(Model):
    """A secret, encrypted by the API and opened only by the activity that needs it.

    `token` is base64(nonce ‖ AES-256-GCM ciphertext); build and registry are its
    associated data (the build alone up to version 0.2).
    """

    key_id: str
    token: str


class PersistedLogin(Model):
    """A login as it stands in histories. AWS's access key id is the user name."""

    kind: str
    username: str = ""
    secret: Sealed | None = None
    region: str = ""


class _Login(Model):
    """Base of all logins."""

    TOKEN_RUNS_OUT: ClassVar[bool] = False
    """Whether its password is a token: one that is refused is worth a second login."""

    kind: str

    def persisted(self) -> PersistedLogin:
        """Return its persisted form."""
        return PersistedLogin(kind=self.kind)

    @model_serializer
    def _to_persisted(self) -> PersistedLogin:
        return self.persisted()


class PasswordLogin(_Login):
    """A user name and a password."""

    kind: Literal["password"] = "password"
    username: str
    secret: Sealed
    """The password."""

    def persisted(self) -> PersistedLogin:
        """Return its persisted form."""
        return PersistedLogin(kind=self.kind, username=self.username, secret=self.secret)


class GoogleKeyLogin(_Login):
    """A key of a Google service account."""

    kind: Literal["google_key"] = "google_key"
    secret: Sealed
    """The key, in JSON."""

    def persisted(self) -> PersistedLogin:
        """Return its persisted form."""
        return PersistedLogin(kind=self.kind, secret=self.secret)


class GoogleDefaultLogin(_Login):
    """The host's own Google credentials."""

    TOKEN_RUNS_OUT = True

    kind: Literal["google_default"] = "google_default"


class AwsLogin(_Login):
    """A key of AWS; ECR gives a token for it."""

    TOKEN_RUNS_OUT = True

    kind: Literal["aws"] = "aws"
    access_key_id: str
    secret: Sealed
    """The secret access key."""
    region: str

    def persisted(self) -> PersistedLogin:
        """Return its persisted form."""
        return PersistedLogin(
            kind=self.kind, username=self.access_key_id, secret=self.secret, region=self.region
        )

    @model_validator(mode="before")
    @classmethod
    def _from_persisted(cls, data: object) -> object:
        if not isinstance(data, dict) or "username" not in data:
            return data
        return {"access_key_id": data["username"], **data}


RegistryLogin = Annotated[
    PasswordLogin | GoogleKeyLogin | GoogleDefaultLogin | AwsLogin, Field(discriminator="kind")
]
