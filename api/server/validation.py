"""From a request to a `TemplateConfig`: everything is checked before anything starts.

All bad fields are collected, so that a user mends a request in one go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import assert_never

import grpc

from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.image_steps import (
    Add,
    Arg,
    Copy,
    Env,
    ImageStep,
    Meaning,
    PersistedStep,
    Run,
    User,
    Workdir,
    image_step,
)
from activities.contract.names import LAYER_ID, canonical_build_id, tenant_mark
from activities.contract.network_policy import NetworkAccess, NetworkPolicy
from activities.contract.references import (
    DEFAULT_TAG,
    WRONG_REFERENCE,
    TemplateReference,
    tag_name,
    template_name,
)
from activities.contract.registry_logins import (
    MAX_SECRET_CHARS,
    AwsLogin,
    GoogleDefaultLogin,
    GoogleKeyLogin,
    PasswordLogin,
    RegistryLogin,
    Sealed,
)
from activities.contract.requests import (
    MAX_CONFIG_BYTES,
    MAX_IMAGE_STEPS,
    BuildOptions,
    TemplateConfig,
)
from activities.contract.sources import FromImage, FromTemplate, Source
from activities.process.addresses import INSIDE, is_inner_name, literal_address
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.store.objects import SentFiles
from api.errors import ApiError, Violation, failed_precondition, invalid_argument
from api.pb import template_manager_pb2 as pb
from api.server.own_images import own_image, require_not_anothers
from api.server.tenancy import tenant_for

MAX_VCPU = 32
MIN_MEMORY_MB, MAX_MEMORY_MB = 128, 32_768
MAX_DISK_MB = 65_536
MAX_IMAGE_CHARS = 512
MAX_COMMAND_CHARS = 32_768
MAX_ENV_CHARS = 131_072
MAX_TEAM_CHARS = 256
TEMPLATE_ID = re.compile(r"[a-z0-9-]{1,63}")
WRONG_TEMPLATE_ID = "must be 1 to 63 of a-z, 0-9 and -"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
WRONG_ENV_NAME = "the name must be letters, digits and _, no digit first"
SHA256 = re.compile(r"[0-9a-f]{64}")
OCTAL = re.compile(r"0?[0-7]{3,4}")
MAX_STEP_ARGUMENTS = 200
# How many arguments each step takes: fewest and most.
STEP_ARGUMENTS = {
    "RUN": (1, 2),
    "COPY": (2, 4),
    "ADD": (2, 4),
    "ENV": (2, MAX_STEP_ARGUMENTS),
    "ARG": (2, MAX_STEP_ARGUMENTS),
    "WORKDIR": (1, 1),
    "USER": (1, 2),
}
# As the DNS has it (RFC 1123).
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*{_LABEL}")
ACCESS = {
    pb.NoNetwork: NetworkAccess.NONE,
    pb.Internet: NetworkAccess.INTERNET,
    pb.AllowedOnly: NetworkAccess.ALLOW,
}
AWS_KEY = re.compile(r"[A-Za-z0-9_]{1,128}")
AWS_REGION = re.compile(r"[a-z0-9-]{1,32}")


@dataclass(frozen=True)
class ValidRequest:
    """What a request asks for, once it has been found to be right."""

    config: TemplateConfig
    options: BuildOptions
    cache_scope: str = ""
    """Within which the files of its COPY steps are called what its client likes; '' is none."""


def validate(request: pb.TemplateCreateRequest, settings: Settings, sealer: Sealer) -> ValidRequest:
    """Check a request and seal its secret.

    Raises ApiError: INVALID_ARGUMENT with every bad field, or FAILED_PRECONDITION for what is
    well-formed but not to be had here.
    """
    if not request.HasField("template"):
        raise invalid_argument([Violation("template", "must be given")])
    return _Validator(request, settings, sealer).validate()


def meaning_of(request: pb.TemplateCreateRequest) -> Meaning:
    """Tell whose words a request is in: E2B's control plane says its version, or a cache scope."""
    is_e2b = request.HasField("version") or request.HasField("cache_scope")
    return Meaning.E2B if is_e2b else Meaning.DOCKER


def require_build_id(value: str, field: str = "build_id") -> str:
    """Return the canonical build id. Raises ApiError INVALID_ARGUMENT when it is not a UUID."""
    try:
        return canonical_build_id(value)
    except ValueError as error:
        raise invalid_argument([Violation(field, str(error))]) from None


def require_sent_files(request: pb.InitLayerFileUploadRequest) -> SentFiles:
    """Return what files to upload are called.

    Raises ApiError INVALID_ARGUMENT with every bad field.
    """
    sent = SentFiles(request.hash, request.cache_scope)
    violations = []
    if not TEMPLATE_ID.fullmatch(request.template_id):
        violations.append(Violation("template_id", WRONG_TEMPLATE_ID))
    if wrong := _wrong_files_hash(sent):
        violations.append(Violation("hash", wrong))
    if violations:
        raise invalid_argument(violations)
    return sent


def _wrong_files_hash(sent: SentFiles) -> str:
    """Tell what is wrong with the name of files, or ''."""
    if sent.scope:
        return "" if sent.hash else "must be given: what the files are called in cache_scope"
    if SHA256.fullmatch(sent.hash):
        return ""
    return "must be a SHA-256, 64 hex digits in lower case, where there is no cache_scope"


def name_violations(name: str, tags: Sequence[str], path: str = "") -> list[Violation]:
    """Return what is wrong with a template's name and tags of it."""
    violations = []
    for field, value, check in (
        ("name", name, template_name),
        *((f"tags[{number}]", tag, tag_name) for number, tag in enumerate(tags)),
    ):
        try:
            check(value)
        except ValueError as error:
            violations.append(Violation(f"{path}{field}", str(error)))
    return violations


def tags_of(tags: Sequence[str]) -> tuple[str, ...]:
    """Return the tags that are asked for: `default` where none is told, each once."""
    return tuple(dict.fromkeys(tags)) or (DEFAULT_TAG,)


def options_for(config: TemplateConfig, settings: Settings) -> BuildOptions:
    """Return the limits of a build: the settings' ones, and what its request asks for."""
    seconds = config.ready_timeout_seconds
    if seconds is None:
        return settings.build
    return settings.build.model_copy(update={"ready_timeout_seconds": seconds})


def config_sha256(config: TemplateConfig) -> str:
    """Return the identity of a config: two requests for one build id must agree in it.

    Left out are the registry's credentials: they are secret, sealed anew each time, may be
    rotated, and say nothing about the template; so do its place among those that wait, whether the
    disk of a failed step is kept, and what its base was called.
    """
    same = config.without_secrets().model_copy(update={"is_batch": False, "keep_failed": False})
    if isinstance(same.source, FromTemplate):
        same = same.model_copy(update={"source": FromTemplate(build_id=same.source.build_id)})
    # Without defaults, so that a field that is added later changes no identity.
    plain = same.model_dump(mode="json", exclude_defaults=True)
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class _Validator:
    """Checks one request, field by field."""

    def __init__(
        self, request: pb.TemplateCreateRequest, settings: Settings, sealer: Sealer
    ) -> None:
        template = request.template
        self._template = template
        self._scope = request.cache_scope
        self._meaning = meaning_of(request)
        self._settings = settings
        self._sealer = sealer
        self._violations: list[Violation] = []
        self._build_id = ""
        self._tenant = tenant_for(template.team_id)
        self._base_id: str | None = None
        self._steps: list[ImageStep] = []

    def validate(self) -> ValidRequest:
        self._check_ids()
        self._check_name()
        self._check_sizes()
        self._check_names()
        self._check_priority()
        self._check_image()
        self._check_commands()
        self._check_env("env", self._template.env, MAX_ENV_CHARS)
        self._check_env("secret_env", self._template.secret_env, MAX_SECRET_CHARS)
        self._check_registry()
        self._check_base()
        self._check_steps()
        self._check_network()
        if self._template.secret_env and not any(isinstance(step, Run) for step in self._steps):
            self._bad("secret_env", "is for the steps of type RUN alone, and there is none")
        if self._violations:
            raise invalid_argument(self._violations)
        self._check_preconditions()
        config = self._config()
        _require_small(config)
        if isinstance(config.source, FromImage):
            reference = config.source.reference
            require_not_anothers(self._settings.registry, reference, self._tenant)
        return ValidRequest(config, options_for(config, self._settings), self._scope)

    def _bad(self, field: str, description: str) -> None:
        self._violations.append(Violation(f"template.{field}", description))

    def _check_ids(self) -> None:
        try:
            self._build_id = canonical_build_id(self._template.build_id)
        except ValueError as error:
            self._bad("build_id", str(error))
        if LAYER_ID.fullmatch(self._build_id):
            self._bad("build_id", "must be no UUID of version 8: layers of disks have these")
        if not TEMPLATE_ID.fullmatch(self._template.template_id):
            self._bad("template_id", WRONG_TEMPLATE_ID)
        elif self._is_own() and self._build_id and not _is_reference(self._own_image()):
            self._bad("template_id", f"does not give the name of an image: {self._own_image()}")
        if len(self._template.team_id) > MAX_TEAM_CHARS:
            chars = len(self._template.team_id)
            self._bad("team_id", f"has {chars} characters; at most {MAX_TEAM_CHARS} are allowed")

    def _check_name(self) -> None:
        template = self._template
        if template.name:
            self._violations += name_violations(template.name, template.tags, "template.")
        elif template.tags:
            self._bad("tags", "are those of a name: give it, too")

    def _check_sizes(self) -> None:
        template = self._template
        vcpus, memory = template.vcpu_count, template.memory_mb
        if not (vcpus == 1 or (vcpus % 2 == 0 and 2 <= vcpus <= MAX_VCPU)):
            self._bad("vcpu_count", f"is {vcpus}; must be 1, or even and at most {MAX_VCPU}")
        if memory % 2 or not MIN_MEMORY_MB <= memory <= MAX_MEMORY_MB:
            limits = f"{MIN_MEMORY_MB} to {MAX_MEMORY_MB}"
            self._bad("memory_mb", f"is {memory}; must be even and from {limits} (MiB)")
        if not 0 <= template.disk_size_mb <= MAX_DISK_MB:
            size = template.disk_size_mb
            self._bad("disk_size_mb", f"is {size}; must be from 0 to {MAX_DISK_MB} (MiB)")
        limit = int(self._settings.build.ready_timeout_seconds)
        if template.ready_timeout_seconds > limit:
            seconds = template.ready_timeout_seconds
            self._bad("ready_timeout_seconds", f"is {seconds}; this server allows up to {limit}")

    def _check_priority(self) -> None:
        known = pb.BuildPriority.values()
        if self._template.priority not in known:
            self._bad("priority", f"is {self._template.priority}; must be one of {known}")

    def _check_names(self) -> None:
        for field in ("kernel_version", "firecracker_version"):
            value = getattr(self._template, field)
            if value and not PLAIN_NAME.fullmatch(value):
                self._bad(field, "must be a plain name of a-z, 0-9, ., _, + and -, or be empty")

    def _check_image(self) -> None:
        given = self._template.from_image
        if given and not _is_reference(given):
            self._bad(
                "from_image",
                "is not an image reference; write registry/repository:tag in lower case, such as "
                "docker.io/library/debian:12",
            )

    def _check_commands(self) -> None:
        for field in ("start_command", "ready_command"):
            value = getattr(self._template, field)
            if "\0" in value:
                self._bad(field, "must not contain a NUL character")
            if len(value) > MAX_COMMAND_CHARS:
                told = f"has {len(value)} characters; at most {MAX_COMMAND_CHARS} are allowed"
                self._bad(field, f"{told}: use a script")

    def _check_env(self, field: str, env: Mapping[str, str], most_chars: int) -> None:
        for name in sorted(env):
            if not ENV_NAME.fullmatch(name):
                self._bad(f"{field}[{name[:64]!r}]", WRONG_ENV_NAME)
            elif "\0" in env[name]:
                self._bad(f"{field}[{name!r}]", "the value must not contain a NUL character")
        chars = sum(len(name) + len(value) for name, value in env.items())
        if chars > most_chars:
            self._bad(field, f"has {chars} characters in all; at most {most_chars} are allowed")

    def _check_registry(self) -> None:
        if not self._template.HasField("from_image_registry"):
            return
        registry = self._template.from_image_registry
        kind = registry.WhichOneof("type")
        if kind is None:
            self._bad("from_image_registry", "must name one of aws, gcp, general")
        elif kind == "general":
            self._require("general.username", registry.general.username)
            if ":" in registry.general.username or not registry.general.username.isprintable():
                told = "must have no colon, which would end it, and no control character"
                self._bad("from_image_registry.general.username", told)
            self._require("general.password", registry.general.password)
        elif kind == "aws":
            if not AWS_KEY.fullmatch(registry.aws.aws_access_key_id):
                told = "must be 1 to 128 letters, digits and _"
                self._bad("from_image_registry.aws.aws_access_key_id", told)
            self._require("aws.aws_secret_access_key", registry.aws.aws_secret_access_key)
            if not AWS_REGION.fullmatch(registry.aws.aws_region):
                self._bad("from_image_registry.aws.aws_region", "must be a region: eu-central-1, …")
        elif registry.gcp.service_account_json:
            self._check_google_key(registry.gcp.service_account_json)
        else:
            self._check_host_login()

    def _require(self, field: str, value: str) -> None:
        if not value or len(value) > MAX_SECRET_CHARS:
            told = f"has {len(value)} characters; 1 to {MAX_SECRET_CHARS} are allowed"
            self._bad(f"from_image_registry.{field}", told)

    def _check_google_key(self, text: str) -> None:
        try:
            key = json.loads(text) if len(text) <= MAX_SECRET_CHARS else None
        except ValueError:
            key = None
        if not isinstance(key, dict) or "private_key" not in key:
            self._bad(
                "from_image_registry.gcp.service_account_json",
                "must be a service account's key in JSON, or empty for the host's own credentials",
            )

    def _check_host_login(self) -> None:
        image = self._template.from_image or self._own_image()
        if _is_reference(image):  # else that is said
            reference = ImageReference.parse(image)
            if not self._settings.lends_host_login_to(reference):
                self._bad(
                    "from_image_registry.gcp",
                    f"the hosts' own credentials are not for {reference.name}; give "
                    "service_account_json, or let an operator name it in "
                    "TEMPLATE_MANAGER_HOST_LOGIN_REGISTRIES",
                )

    def _check_base(self) -> None:
        if not self._template.HasField("from_template"):
            return
        try:
            self._base_id = canonical_build_id(self._template.from_template.build_id)
        except ValueError:
            self._bad("from_template.build_id", WRONG_REFERENCE)

    def _check_steps(self) -> None:
        steps = self._template.steps
        if len(steps) > MAX_IMAGE_STEPS:
            self._bad("steps", f"are {len(steps)}; at most {MAX_IMAGE_STEPS} are allowed")
        for number, step in enumerate(steps):
            try:
                self._steps.append(parse_step(step, self._scope))
            except WrongStepError as error:
                self._bad(f"steps[{number}]", str(error))

    def _check_network(self) -> None:
        network = self._template.network
        known = pb.NetworkAccess.values()
        if network.access not in known:
            self._bad("network.access", f"is {network.access}; must be one of {known}")
        if network.access == pb.AllowedOnly and not network.allowed:
            self._bad("network.allowed", "must name what may be reached")
        if network.access != pb.AllowedOnly and network.allowed:
            self._bad("network.allowed", "is for the access AllowedOnly alone")
        for number, entry in enumerate(network.allowed):
            if wrong := _wrong_destination(entry):
                self._bad(f"network.allowed[{number}]", wrong)

    def _network(self) -> NetworkPolicy | None:
        network = self._template.network
        if network.access == pb.ServerDefault:
            return None
        return NetworkPolicy(access=ACCESS[network.access], allowed=tuple(network.allowed))

    def _check_preconditions(self) -> None:
        if (self._secret() or self._template.secret_env) and not self._sealer.can_seal:
            raise failed_precondition(
                "NO_SECRET_KEY",
                "this server has no key to seal secrets with",
                "An operator sets TEMPLATE_MANAGER_SECRET_KEYS for the API and all hosts.",
            )

    def _config(self) -> TemplateConfig:
        template, settings, tenant = self._template, self._settings, self._tenant
        return TemplateConfig(
            template_id=template.template_id,
            build_id=self._build_id,
            source=self._source(),
            memory_mb=template.memory_mb,
            vcpu_count=template.vcpu_count,
            disk_size_mb=template.disk_size_mb,
            kernel_version=template.kernel_version or settings.default_kernel_version,
            firecracker_version=template.firecracker_version
            or settings.default_firecracker_version,
            start_command=template.start_command,
            ready_command=template.ready_command,
            env=dict(template.env),
            force=template.force,
            # To leave the team out and to say it is the same request.
            team_id=template.team_id if template.team_id != tenant else "",
            huge_pages=template.huge_pages,
            steps=tuple(self._steps),
            ready_timeout_seconds=template.ready_timeout_seconds or None,
            tenant=tenant,
            secret_env=self._secret_env(tenant),
            is_batch=template.priority == pb.Batch,
            name=template.name or None,
            tags=tags_of(template.tags) if template.name else (),
            meaning=self._meaning,
            keep_failed=template.keep_failed,
            network=self._network(),
        )

    def _secret_env(self, tenant: str) -> dict[str, Sealed]:
        """Return the secret variables sealed: none can be opened as another, or for another."""
        return {
            name: self._sealer.seal(value, SealedFor(self._build_id, "", tenant_mark(tenant), name))
            for name, value in sorted(self._template.secret_env.items())
        }

    def _source(self) -> Source:
        if self._base_id is not None:
            return FromTemplate(build_id=self._base_id, alias=self._base_alias())
        reference = self._template.from_image or self._own_image()
        return FromImage(reference=reference, is_own=self._is_own(), login=self._login(reference))

    def _base_alias(self) -> str:
        """Return what the base was called, to be told of; it is not what says which it is."""
        alias = self._template.from_template.alias
        try:
            TemplateReference.parse(alias)
        except ValueError:  # an id, or what E2B's users call it: that is no name here
            return ""
        return alias

    def _is_own(self) -> bool:
        if self._template.HasField("from_template"):
            return False
        return not self._template.from_image or self._is_own_at_a_digest()

    def _is_own_at_a_digest(self) -> bool:
        """Whether a client has pushed the service's own image, and says which it was."""
        name, at, _ = self._template.from_image.partition("@")
        return bool(at) and name == self._own_image()

    def _own_image(self) -> str:
        template, registry = self._template, self._settings.registry
        return own_image(registry, self._tenant, template.template_id, self._build_id)

    def _secret(self) -> str:
        registry = self._template.from_image_registry
        return (
            registry.general.password
            or registry.aws.aws_secret_access_key
            or registry.gcp.service_account_json
        )

    def _login(self, reference: str) -> RegistryLogin | None:
        registry = self._template.from_image_registry
        host = ImageReference.parse(reference).registry
        only_for = SealedFor(self._build_id, host, tenant_mark(self._tenant))

        def sealed(secret: str) -> Sealed:
            return self._sealer.seal(secret, only_for)

        match registry.WhichOneof("type"):
            case "general":
                password = sealed(registry.general.password)
                return PasswordLogin(username=registry.general.username, secret=password)
            case "aws":
                return AwsLogin(
                    access_key_id=registry.aws.aws_access_key_id,
                    secret=sealed(registry.aws.aws_secret_access_key),
                    region=registry.aws.aws_region,
                )
            case "gcp" if registry.gcp.service_account_json:
                return GoogleKeyLogin(secret=sealed(registry.gcp.service_account_json))
            case "gcp":
                return GoogleDefaultLogin()
            case _:
                return None


def _require_small(config: TemplateConfig) -> None:
    """Raise ApiError for what does not fit into a history with all that a build adds to it.

    Characters that JSON spells out make it longer than the request was.
    """
    size_bytes = len(config.model_dump_json().encode())
    if size_bytes > MAX_CONFIG_BYTES:
        told = f"has {size_bytes} bytes, as it is kept; at most {MAX_CONFIG_BYTES} are allowed"
        raise invalid_argument([Violation("template", f"{told}: COPY scripts and files")])


def _wrong_destination(entry: str) -> str:
    """Say what is wrong with what a guest is to be led to; '' if nothing is."""
    try:
        network = IPv4Network(entry)
    except ValueError:
        if not HOST_NAME.fullmatch(entry) or literal_address(entry):
            return "must be an IPv4 network, such as 203.0.113.0/24, or a host name"
        return "is a name of the inside" if is_inner_name(entry) else ""
    inside = [each for each in INSIDE if isinstance(each, IPv4Network)]
    is_inner = any(network.subnet_of(each) for each in inside)
    return "is of the inside, which no guest reaches" if is_inner else ""


def _is_reference(image: str) -> bool:
    if len(image) > MAX_IMAGE_CHARS:
        return False
    try:
        ImageReference.parse(image)
    except ImageReferenceError:
        return False
    return True


class WrongStepError(ValueError):
    """A step that cannot be understood; the message says why."""


def parse_step(step: pb.TemplateStep, scope: str = "") -> ImageStep:
    """Return a step of a request, whose files are called so in a scope. Raises WrongStepError."""
    kind = step.type.upper()
    _require_arguments(step, kind)
    parsed = image_step(
        PersistedStep(
            kind=kind, args=tuple(step.args), force=step.force, files_sha256=step.files_hash
        )
    )
    _require_sense(parsed, scope)
    return parsed


def _require_arguments(step: pb.TemplateStep, kind: str) -> None:
    if kind not in STEP_ARGUMENTS:
        raise WrongStepError(f"is {step.type[:32]!r}; must be one of {', '.join(STEP_ARGUMENTS)}")
    fewest, most = STEP_ARGUMENTS[kind]
    if not fewest <= len(step.args) <= most:
        raise WrongStepError(f"{kind} has {len(step.args)} arguments; it takes {fewest} to {most}")
    if any("\0" in argument for argument in step.args):
        raise WrongStepError(f"{kind} must not contain a NUL character")
    chars = sum(map(len, step.args))
    if chars > MAX_COMMAND_CHARS:
        raise WrongStepError(
            f"{kind} has {chars} characters; at most {MAX_COMMAND_CHARS} are allowed: COPY a script"
        )
    if not step.args[0]:
        raise WrongStepError(f"{kind} needs its first argument")
    if kind in ("ENV", "ARG") and len(step.args) % 2:
        raise WrongStepError(f"{kind} takes pairs of name and value")
    if kind == "USER" and step.args[1:] not in ([], [""], ["true"], ["false"]):
        raise WrongStepError("USER's second argument says whether it has sudo: true or false")


def _require_sense(step: ImageStep, scope: str) -> None:
    match step:
        case Env() | Arg():
            for name, _ in step.variables:
                if not ENV_NAME.fullmatch(name):
                    raise WrongStepError(f"{step.kind} {name[:64]!r}: {WRONG_ENV_NAME}")
        case Copy() | Add():
            if wrong := _wrong_files_hash(SentFiles(step.files_sha256, scope)):
                raise WrongStepError(
                    f"{step.kind} needs files_hash, the name of its tar: it {wrong}"
                )
            if step.mode and not OCTAL.fullmatch(step.mode):
                raise WrongStepError(f"{step.kind}'s mode must be octal, such as 0755")
        case Run() | Workdir() | User():
            pass
        case _:
            assert_never(step)


def require_same_config(config: TemplateConfig, existing_sha256: str) -> None:
    """Raise ApiError ALREADY_EXISTS when a build of this id has another config."""
    if config_sha256(config) == existing_sha256:
        return
    raise ApiError(
        grpc.StatusCode.ALREADY_EXISTS,
        "BUILD_EXISTS_WITH_OTHER_CONFIG",
        f"build {config.build_id} exists with another config",
        hint="Use a new build id for another config.",
        metadata={"build_id": config.build_id},
    )
