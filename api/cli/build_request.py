"""The request for a build, from what the command line gives."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.registry_logins import MAX_SECRET_CHARS
from api.pb import template_manager_pb2 as pb

PASSWORD_VARIABLE = "TEMPLATE_MANAGER_REGISTRY_PASSWORD"  # noqa: S105 # a name, not a password
MAX_TEMPLATE_ID = 63


class OptionError(Exception):
    """An option that cannot be understood. The message names it and says what it should be."""


@dataclass(frozen=True)
class RegistryOptions:
    """How to log in to the image's registry."""

    user: str = ""
    password_stdin: bool = False
    password_file: Path | None = None
    google_key_file: Path | None = None
    google_default: bool = False
    aws_region: str = ""


def require_one_source(given: Mapping[str, bool]) -> None:
    """Raise OptionError unless exactly one of these options says what to build from."""
    *first, last = given
    if not any(given.values()):
        raise OptionError(f"what to build from? Give one of {', '.join(first)} and {last}")
    if sum(given.values()) > 1:
        both = " and ".join(name for name, is_given in given.items() if is_given)
        raise OptionError(f"give {both} apart: a build has one source")


def template_id_of(image: str) -> str:
    """Return a template id made of an image's name: the last part of its path."""
    try:
        name = ImageReference.parse(image.lower()).short_name
    except ImageReferenceError:  # the server says what is wrong with it
        return "template"
    return re.sub(r"[^a-z0-9-]+", "-", name)[:MAX_TEMPLATE_ID]


def new_build_id() -> str:
    """Return a fresh build id."""
    return str(uuid.uuid4())


def environment_of(assignments: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE pairs; NAME alone takes the value from this process's environment.

    Raises OptionError.
    """
    env = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not name:
            raise OptionError(f"--env {assignment}: write --env NAME=VALUE")
        if not sign:
            if name not in os.environ:
                raise OptionError(f"--env {name}: not set here; write --env {name}=VALUE")
            value = os.environ[name]
        env[name] = value
    return env


def network_of(text: str) -> pb.TemplateNetwork | None:
    """Return what `--network` asks for: `none`, `internet`, or a list; None is the default."""
    access = {"none": pb.NoNetwork, "internet": pb.Internet}.get(text)
    if access is not None:
        return pb.TemplateNetwork(access=access)
    allowed = [part.strip() for part in text.split(",") if part.strip()]
    return pb.TemplateNetwork(access=pb.AllowedOnly, allowed=allowed) if allowed else None


def registry_of(
    options: RegistryOptions, environ: Mapping[str, str] = os.environ
) -> pb.FromImageRegistry | None:
    """Return the credentials for the image's registry, or None when none are given.

    Secrets come from standard input, files and the environment, never from arguments, which
    everyone on the machine can read. Raises OptionError.
    """
    kinds = [bool(options.user), bool(options.google_key_file), options.google_default]
    if sum([*kinds, bool(options.aws_region)]) > 1:
        raise OptionError("give one kind of registry credentials: user, Google or AWS")
    if options.user:
        password = _password(options, environ)
        return pb.FromImageRegistry(
            general=pb.GeneralRegistry(username=options.user, password=password)
        )
    if options.google_key_file:
        key = _read(options.google_key_file, "--google-key-file")
        if not key.strip():  # for the server that is the host's own credentials
            raise OptionError(f"--google-key-file: {options.google_key_file} is empty")
        return pb.FromImageRegistry(gcp=pb.GcpRegistry(service_account_json=key))
    if options.google_default:
        return pb.FromImageRegistry(gcp=pb.GcpRegistry())
    if options.aws_region:
        return pb.FromImageRegistry(aws=_aws(options.aws_region, environ))
    if options.password_stdin or options.password_file:
        raise OptionError("a registry password needs --registry-user")
    return None


def _password(options: RegistryOptions, environ: Mapping[str, str]) -> str:
    if options.password_stdin:
        if sys.stdin is None:  # it was closed
            raise OptionError("--registry-password-stdin: there is no standard input")
        return sys.stdin.read().rstrip("\r\n")
    if options.password_file:
        return _read(options.password_file, "--registry-password-file").rstrip("\r\n")
    password = environ.get(PASSWORD_VARIABLE, "")
    if not password:
        raise OptionError(
            "--registry-user needs a password: --registry-password-stdin, "
            f"--registry-password-file or {PASSWORD_VARIABLE}"
        )
    return password


def _aws(region: str, environ: Mapping[str, str]) -> pb.AwsRegistry:
    missing = [n for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not environ.get(n)]
    if missing:
        raise OptionError(f"--aws-region needs {' and '.join(missing)} in the environment")
    return pb.AwsRegistry(
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        aws_region=region,
    )


def _read(path: Path, option: str) -> str:
    try:
        with path.open() as file:
            text = file.read(MAX_SECRET_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{option}: cannot read {path}: {error}") from error
    if len(text) > MAX_SECRET_CHARS:
        raise OptionError(f"{option}: {path} has more than {MAX_SECRET_CHARS} characters")
    return text
