"""Every bad field is found before anything starts, and named with what it must be."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.contract.image_steps import Add, Copy, Env, Meaning, Run, User, Workdir
from activities.contract.network_policy import INTERNET, NO_NETWORK
from activities.contract.registry_logins import (
    AwsLogin,
    GoogleDefaultLogin,
    GoogleKeyLogin,
    PasswordLogin,
    RegistryLogin,
)
from activities.contract.requests import TemplateConfig
from activities.contract.sources import FromImage, FromTemplate
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from api.errors import DETAILS_TRAILER, ApiError
from api.pb import template_manager_pb2 as pb
from api.server.validation import ValidRequest, config_sha256, require_build_id, validate

BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
OTHER_BUILD = "22222222-2222-4222-8222-222222222222"
SETTINGS = Settings(
    secret_keys=SecretStr("k1:" + "A" * 43 + "="),
    registry="registry.test",
    host_login_registries=("docker.io/library",),
)
ONLY_FOR = SealedFor(BUILD, "docker.io")
NO_KEYS = Settings(secret_keys=SecretStr(""))


def template(**changes: Any) -> pb.TemplateConfig:
    values: dict[str, Any] = {
        "template_id": "web",
        "build_id": BUILD,
        "from_image": "docker.io/library/debian:12",
        "memory_mb": 512,
        "vcpu_count": 2,
        "disk_size_mb": 1024,
    }
    return pb.TemplateConfig(**(values | changes))


def check(settings: Settings = SETTINGS, **changes: Any) -> ValidRequest:
    request = pb.TemplateCreateRequest(template=template(**changes))
    return validate(request, settings, Sealer(settings.secret_keys))


def refused(settings: Settings = SETTINGS, **changes: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check(settings, **changes)
    return caught.value


def general(username: str, password: str) -> pb.FromImageRegistry:
    return pb.FromImageRegistry(general=pb.GeneralRegistry(username=username, password=password))


def google(key: str) -> pb.FromImageRegistry:
    return pb.FromImageRegistry(gcp=pb.GcpRegistry(service_account_json=key))


def aws(**fields: str) -> pb.FromImageRegistry:
    return pb.FromImageRegistry(aws=pb.AwsRegistry(**fields))


def login_of(registry: pb.FromImageRegistry) -> RegistryLogin | None:
    source = check(from_image_registry=registry).config.source
    assert isinstance(source, FromImage)
    return source.login


GOOGLE_KEY = json.dumps({"private_key": "x"})
GOOD = {
    "aws_access_key_id": "AKIA",
    "aws_secret_access_key": "secret",
    "aws_region": "eu-central-1",
}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("template_id", {"template_id": ""}),
        ("template_id", {"template_id": "Web"}),
        ("template_id", {"template_id": "web_1"}),
        ("template_id", {"template_id": "web\n"}),
        ("template_id", {"template_id": "w" * 64}),
        ("template_id", {"template_id": "-web", "from_image": ""}),
        ("build_id", {"build_id": ""}),
        ("build_id", {"build_id": "not-a-uuid"}),
        ("build_id", {"build_id": "11111111-2222-8333-8444-555555555555"}),  # as layers have
        ("build_id", {"build_id": BUILD.replace("-", "")}),
        ("build_id", {"build_id": f"{{{BUILD}}}"}),
        ("vcpu_count", {"vcpu_count": 0}),
        ("vcpu_count", {"vcpu_count": -2}),
        ("vcpu_count", {"vcpu_count": 3}),
        ("vcpu_count", {"vcpu_count": 34}),
        ("memory_mb", {"memory_mb": 0}),
        ("memory_mb", {"memory_mb": 126}),
        ("memory_mb", {"memory_mb": 513}),
        ("memory_mb", {"memory_mb": 32_770}),
        ("disk_size_mb", {"disk_size_mb": -1}),
        ("disk_size_mb", {"disk_size_mb": 65_537}),
        ("from_image", {"from_image": "Debian:12"}),
        ("from_image", {"from_image": "debian:"}),
        ("from_image", {"from_image": "debian:12\n"}),
        ("from_image", {"from_image": "https://registry.test/debian"}),
        ("from_image", {"from_image": "debian@sha256:short"}),
        ("from_image", {"from_image": "a" * 600}),
        ("kernel_version", {"kernel_version": "../../etc"}),
        ("kernel_version", {"kernel_version": "a/b"}),
        ("kernel_version", {"kernel_version": ".."}),
        ("kernel_version", {"kernel_version": "6.1\n"}),
        ("firecracker_version", {"firecracker_version": "v1 .13"}),
        ("start_command", {"start_command": "a\0b"}),
        ("start_command", {"start_command": "a" * 40_000}),
        ("ready_command", {"ready_command": "\0"}),
        ("ready_timeout_seconds", {"ready_timeout_seconds": 100_000}),
        ("team_id", {"team_id": "t" * 300}),
        ("priority", {"priority": 7}),
        ("env['1A']", {"env": {"1A": "x"}}),
        ("env['A-B']", {"env": {"A-B": "x"}}),
        ("env['A']", {"env": {"A": "x\0"}}),
        ("env", {"env": {"A": "x" * 200_000}}),
        ("steps", {"steps": [pb.TemplateStep(type="RUN", args=["true"])] * 101}),
        ("from_image_registry", {"from_image_registry": pb.FromImageRegistry()}),
        ("from_image_registry.general.username", {"from_image_registry": general("", "x")}),
        ("from_image_registry.general.password", {"from_image_registry": general("x", "")}),
        (
            "from_image_registry.gcp.service_account_json",
            {"from_image_registry": google("{not json")},
        ),
        ("from_image_registry.gcp.service_account_json", {"from_image_registry": google("{}")}),
        (
            "from_image_registry.aws.aws_region",
            {"from_image_registry": aws(**{**GOOD, "aws_region": "eu/1"})},
        ),
        (
            "from_image_registry.aws.aws_access_key_id",
            {"from_image_registry": aws(**{**GOOD, "aws_access_key_id": ""})},
        ),
        (
            "from_image_registry.aws.aws_access_key_id",
            {"from_image_registry": aws(**{**GOOD, "aws_access_key_id": "AK\r\nX-Header: 1"})},
        ),
        *(
            ("from_image_registry.general.username", {"from_image_registry": general(name, "p")})
            for name in ("a:b", "a\nb", "\x1b[2J", "\u202e")
        ),
        (
            "from_image_registry.aws.aws_secret_access_key",
            {"from_image_registry": aws(**{**GOOD, "aws_secret_access_key": ""})},
        ),
    ],
)
def test_a_bad_field_is_named(field: str, changes: dict[str, Any]) -> None:
    error = refused(**changes)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [f"template.{field}"]
    assert error.violations[0].description
    assert error.hint


def test_all_bad_fields_are_named_at_once_in_what_grpc_lets_through() -> None:
    error = refused(
        template_id="A" * 5000,
        build_id="x",
        vcpu_count=3,
        memory_mb=1,
        disk_size_mb=-1,
        from_image="NO",
        kernel_version="/",
        firecracker_version="/",
        env={f"{number}-{'x' * 100}": "" for number in range(200)},
    )
    fields = {violation.field for violation in error.violations}
    assert {"template.template_id", "template.vcpu_count", "template.kernel_version"} <= fields
    [(name, details)] = error.trailers()
    assert name == DETAILS_TRAILER
    assert len(details) * 4 / 3 + len(error.short_message) < 8 * 1024


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        validate(pb.TemplateCreateRequest(), SETTINGS, Sealer(SETTINGS.secret_keys))
    assert [violation.field for violation in caught.value.violations] == ["template"]


def checked(request: pb.TemplateConfig) -> TemplateConfig:
    create = pb.TemplateCreateRequest(template=request)
    return validate(create, SETTINGS, Sealer(SETTINGS.secret_keys)).config


def test_a_template_can_be_the_base() -> None:
    request = template()
    request.from_template.CopyFrom(pb.FromTemplateConfig(alias="base", build_id=OTHER_BUILD))
    source = checked(request).source
    assert source == FromTemplate(build_id=OTHER_BUILD, alias="base")
    assert source.described == f"template {OTHER_BUILD}"


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        ("web:stable", "web:stable"),
        ("acme/web", "acme/web"),
        ("", ""),
        (OTHER_BUILD, ""),
        ("No Name", ""),
        ("x" * 100_000, ""),
        ("web\n", ""),
        ("../web", ""),
    ],
)
def test_what_a_base_was_called_is_kept_and_makes_no_other_config(alias: str, kept: str) -> None:
    plain, called = template(), template()
    plain.from_template.CopyFrom(pb.FromTemplateConfig(build_id=OTHER_BUILD))
    called.from_template.CopyFrom(pb.FromTemplateConfig(alias=alias, build_id=OTHER_BUILD))
    assert checked(called).source == FromTemplate(build_id=OTHER_BUILD, alias=kept)
    assert config_sha256(checked(called)) == config_sha256(checked(plain))


def test_a_base_template_needs_no_login() -> None:
    request = template(from_image_registry=general("me", "hunter2"))
    request.from_template.CopyFrom(pb.FromTemplateConfig(build_id=OTHER_BUILD))
    assert checked(request).source == FromTemplate(build_id=OTHER_BUILD)


def test_the_base_template_must_be_named_by_its_build() -> None:
    request = template()
    request.from_template.CopyFrom(pb.FromTemplateConfig(alias="base"))
    with pytest.raises(ApiError) as caught:
        checked(request)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["template.from_template.build_id"]


def test_steps_are_taken_as_e2b_sends_them() -> None:
    steps = [
        pb.TemplateStep(type="RUN", args=["make", ""]),
        pb.TemplateStep(type="COPY", args=["src", "/app", "", ""], files_hash="a" * 64),
        pb.TemplateStep(type="ENV", args=["A", "1", "B", "2"], force=True),
        pb.TemplateStep(type="WORKDIR", args=["/app"]),
        pb.TemplateStep(type="USER", args=["web"]),
        pb.TemplateStep(type="USER", args=["web", "true"]),
        pb.TemplateStep(type="ADD", args=["a.tar", "/app"], files_hash="a" * 64),
    ]
    found = checked(template(steps=steps)).steps
    assert found == (
        Run(command="make", user=""),
        Copy(source="src", destination="/app", owner="", mode="", files_sha256="a" * 64),
        Env(variables=(("A", "1"), ("B", "2")), force=True),
        Workdir(path="/app"),
        User(name="web"),
        User(name="web", sudo="true"),
        Add(source="a.tar", destination="/app", files_sha256="a" * 64),
    )


def test_files_in_a_scope_are_called_what_the_client_likes() -> None:
    step = pb.TemplateStep(type="COPY", args=["src", "/app"], files_hash="src@1 ../é")
    request = pb.TemplateCreateRequest(template=template(steps=[step]), cache_scope="team")
    found = validate(request, SETTINGS, Sealer(SETTINGS.secret_keys))
    assert found.cache_scope == "team"
    assert found.config.steps == (
        Copy(source="src", destination="/app", files_sha256="src@1 ../é"),
    )
    step.files_hash = ""
    request.template.steps[0].CopyFrom(step)
    with pytest.raises(ApiError) as caught:
        validate(request, SETTINGS, Sealer(SETTINGS.secret_keys))
    assert [violation.field for violation in caught.value.violations] == ["template.steps[0]"]


def test_e2bs_control_plane_is_known_by_its_version_or_cache_scope() -> None:
    asked = pb.TemplateCreateRequest(template=template())
    sealer = Sealer(SETTINGS.secret_keys)
    assert validate(asked, SETTINGS, sealer).config.meaning is Meaning.DOCKER
    for of_e2b in ({"version": "2.0.0"}, {"cache_scope": "team"}, {"version": ""}):
        asked = pb.TemplateCreateRequest(template=template(), **of_e2b)
        assert validate(asked, SETTINGS, sealer).config.meaning is Meaning.E2B


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (pb.TemplateStep(type="VOLUME", args=["a"]), "must be one of RUN, COPY"),
        (pb.TemplateStep(type="ADD", args=["a", "b"]), "ADD needs files_hash"),
        (pb.TemplateStep(type="USER", args=["web", "yes"]), "true or false"),
        (pb.TemplateStep(type="RUN"), "takes 1 to 2"),
        (pb.TemplateStep(type="RUN", args=[""]), "first argument"),
        (pb.TemplateStep(type="RUN", args=["a\0b"]), "NUL"),
        (pb.TemplateStep(type="RUN", args=["x" * 40_000]), "at most"),
        (pb.TemplateStep(type="ENV", args=["A", "1", "B"]), "pairs"),
        (pb.TemplateStep(type="ENV", args=["1A", "1"]), "'1A'"),
        (pb.TemplateStep(type="COPY", args=["a", "b"]), "files_hash"),
        (pb.TemplateStep(type="COPY", args=["a", "b"], files_hash="../x"), "files_hash"),
        (
            pb.TemplateStep(type="COPY", args=["a", "b", "", "rwx"], files_hash="a" * 64),
            "octal",
        ),
    ],
)
def test_a_bad_step_is_named(step: pb.TemplateStep, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked(template(steps=[pb.TemplateStep(type="RUN", args=["true"]), step]))
    [violation] = caught.value.violations
    assert violation.field == "template.steps[1]"
    assert told in violation.description


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpu_count": 1, "memory_mb": 128, "disk_size_mb": 0},
        {"vcpu_count": 32, "memory_mb": 32_768, "disk_size_mb": 65_536},
        {"from_image": "debian"},
        {"from_image": "localhost:5000/a/b_c/d--e:v1.2_3"},
        {"from_image": "registry.test/x@sha256:" + "a" * 64},
        {"template_id": "a" * 63},
        {"build_id": BUILD.upper()},
        {"env": {"_A1": "any\nthing"}},
    ],
)
def test_limits_themselves_are_allowed(changes: dict[str, Any]) -> None:
    assert check(**changes).config.build_id == BUILD


def test_what_json_spells_out_is_counted_as_it_is_kept() -> None:
    steps = [pb.TemplateStep(type="RUN", args=["\1" * 30_000])] * 6
    with pytest.raises(ApiError) as error:
        check(steps=steps)
    [violation] = error.value.violations
    assert "at most 1048576 are allowed" in violation.description
    assert len(check(steps=steps[1:]).config.steps) == 5


def test_what_is_left_out_comes_from_the_settings() -> None:
    valid = check(from_image="")
    assert valid.config.source == FromImage(reference=f"registry.test/web:{BUILD}", is_own=True)
    assert valid.config.kernel_version == SETTINGS.default_kernel_version
    assert valid.config.firecracker_version == SETTINGS.default_firecracker_version
    assert valid.options == SETTINGS.build
    assert check(ready_timeout_seconds=7).options.ready_timeout_seconds == 7


def test_the_service_s_own_image_may_be_pinned_to_what_was_pushed() -> None:
    digest = "sha256:" + "a" * 64
    own = f"registry.test/web:{BUILD}"
    source = check(from_image=f"{own}@{digest}").config.source
    assert source == FromImage(reference=f"{own}@{digest}", is_own=True)
    assert source.own_tag == own


@pytest.mark.parametrize(
    "image",
    [
        f"registry.test/web:{BUILD}",  # as somebody names it: only a default is the service's
        f"registry.test/web@sha256:{'a' * 64}",
        f"registry.test/other:{BUILD}@sha256:{'a' * 64}",
        f"elsewhere.test/web:{BUILD}@sha256:{'a' * 64}",
    ],
)
def test_other_images_are_not_the_service_s_own(image: str) -> None:
    source = check(from_image=image).config.source
    assert isinstance(source, FromImage)
    assert (source.is_own, source.own_tag) == (False, None)


def test_huge_pages_are_a_wish_which_no_request_fails_for() -> None:
    assert check(huge_pages=True).config.huge_pages


def test_a_secret_is_sealed_for_its_build() -> None:
    login = login_of(general("me", "hunter2"))
    assert isinstance(login, PasswordLogin)
    assert login.username == "me"
    assert "hunter2" not in login.model_dump_json()
    assert Sealer(SETTINGS.secret_keys).open(login.secret, ONLY_FOR) == "hunter2"


def test_without_a_key_a_secret_is_refused_with_the_fix() -> None:
    error = refused(NO_KEYS, from_image_registry=general("me", "hunter2"))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "TEMPLATE_MANAGER_SECRET_KEYS" in error.hint
    assert "hunter2" not in error.message


@pytest.mark.parametrize(
    ("registry", "secret"),
    [
        (google(GOOGLE_KEY), GOOGLE_KEY),
        (google(""), None),
        (aws(**GOOD), "secret"),
    ],
)
def test_each_kind_of_credentials_is_known(
    registry: pb.FromImageRegistry, secret: str | None
) -> None:
    match login_of(registry):
        case GoogleKeyLogin(secret=sealed):
            assert Sealer(SETTINGS.secret_keys).open(sealed, ONLY_FOR) == secret == GOOGLE_KEY
        case GoogleDefaultLogin():
            assert secret is None
        case AwsLogin(access_key_id="AKIA", secret=sealed, region="eu-central-1"):
            assert Sealer(SETTINGS.secret_keys).open(sealed, ONLY_FOR) == secret == "secret"
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize(
    ("image", "lent"),
    [
        ("docker.io/library/debian", True),
        ("debian", True),
        ("docker.io/library-of-mine/debian", False),
        ("docker.io/mine/library", False),
        ("evil.test/library/debian", False),
        ("", False),  # the service's own
    ],
)
def test_the_hosts_own_login_is_for_named_registries_alone(image: str, lent: bool) -> None:
    if lent:
        check(from_image=image, from_image_registry=google(""))
        return
    error = refused(from_image=image, from_image_registry=google(""))
    [violation] = error.violations
    assert violation.field == "template.from_image_registry.gcp"
    assert "TEMPLATE_MANAGER_HOST_LOGIN_REGISTRIES" in violation.description


def test_a_build_id_is_made_canonical_or_refused() -> None:
    assert require_build_id(BUILD.upper()) == BUILD
    with pytest.raises(ApiError) as caught:
        require_build_id("x")
    assert caught.value.violations[0].field == "build_id"


# ---- The identity of a config


def test_the_same_request_has_the_same_hash_whatever_its_secrets() -> None:
    plain = check().config
    first = check(from_image_registry=general("me", "old password")).config
    second = check(from_image_registry=general("me", "new password")).config
    assert first != second
    assert config_sha256(plain) == config_sha256(first) == config_sha256(second)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_mb": 1024},
        {"start_command": "x"},
        {"env": {"A": "1"}},
        {"kernel_version": "other"},
        {"from_image": "debian:13"},
    ],
)
def test_another_request_has_another_hash(changes: dict[str, Any]) -> None:
    assert config_sha256(check(**changes).config) != config_sha256(check().config)


def test_the_order_of_the_environment_does_not_matter() -> None:
    one = check(env={"A": "1", "B": "2"}).config
    other = check(env={"B": "2", "A": "1"}).config
    assert config_sha256(one) == config_sha256(other)


def test_the_hash_survives_the_metadata() -> None:
    """A template's metadata keeps the config without credentials, and must still be comparable."""
    config = check(from_image_registry=general("me", "x")).config
    kept = TemplateConfig.model_validate_json(config.without_secrets().model_dump_json())
    assert config_sha256(kept) == config_sha256(config)


def test_secret_variables_are_sealed_each_for_itself() -> None:
    sealer = Sealer(SETTINGS.secret_keys)
    sealed = sealer.seal("hunter2", SealedFor(BUILD, "", variable="TOKEN"))
    assert "hunter2" not in sealed.model_dump_json()
    assert sealer.open(sealed, SealedFor(BUILD, "", variable="TOKEN")) == "hunter2"
    for other in (
        SealedFor(BUILD, "", variable="OTHER"),
        SealedFor(OTHER_BUILD, "", variable="TOKEN"),
        SealedFor(BUILD, "", tenant="them", variable="TOKEN"),
        SealedFor(BUILD, ""),
        SealedFor(BUILD, "TOKEN"),
    ):
        with pytest.raises(SealedSecretError):
            sealer.open(sealed, other)


def test_what_was_sealed_for_a_registry_is_no_variable() -> None:
    sealer = Sealer(SETTINGS.secret_keys)
    sealed = sealer.seal("hunter2", ONLY_FOR)
    with pytest.raises(SealedSecretError):
        sealer.open(sealed, SealedFor(BUILD, "docker.io", variable="TOKEN"))


RUN_STEP = pb.TemplateStep(type="RUN", args=["id"])


def test_secret_variables_are_sealed_for_their_build_and_name() -> None:
    config = check(secret_env={"NPM_TOKEN": "hunter2"}, steps=[RUN_STEP]).config
    assert "hunter2" not in config.model_dump_json()
    sealer, sealed = Sealer(SETTINGS.secret_keys), config.secret_env["NPM_TOKEN"]
    assert sealer.open(sealed, SealedFor(BUILD, "", variable="NPM_TOKEN")) == "hunter2"
    for other in (
        SealedFor(OTHER_BUILD, "", variable="NPM_TOKEN"),
        SealedFor(BUILD, "", variable="A"),
    ):
        with pytest.raises(SealedSecretError):
            sealer.open(sealed, other)


def test_secret_variables_without_a_run_are_refused() -> None:
    error = refused(secret_env={"NPM_TOKEN": "hunter2"})
    [violation] = error.violations
    assert violation.field == "template.secret_env"
    assert "RUN" in violation.description


@pytest.mark.parametrize(
    ("env", "field", "told"),
    [
        ({"1A": "x"}, "secret_env['1A']", "no digit first"),
        ({"A": "x\0y"}, "secret_env['A']", "NUL"),
        ({"A": "x" * 40_000, "B": "x" * 40_000}, "secret_env", "has 80002 characters in all"),
    ],
)
def test_secret_variables_have_limits(env: dict[str, str], field: str, told: str) -> None:
    error = refused(secret_env=env, steps=[RUN_STEP])
    [violation] = error.violations
    assert violation.field == f"template.{field}"
    assert told in violation.description
    assert "xxxx" not in violation.description


def test_a_server_without_a_key_takes_no_secret_variables() -> None:
    assert refused(NO_KEYS, secret_env={"A": "x"}, steps=[RUN_STEP]).reason == "NO_SECRET_KEY"


def test_what_is_kept_for_long_has_nothing_sealed() -> None:
    sealed = Sealer(SETTINGS.secret_keys).seal("hunter2", SealedFor(BUILD, "", variable="A"))
    config = check().config.model_copy(update={"secret_env": {"A": sealed}})
    assert config.has_secrets
    kept = config.without_secrets()
    assert not kept.has_secrets
    assert "secret_env" not in kept.model_dump()
    assert TemplateConfig.model_validate_json(config.model_dump_json()) == config
    assert config_sha256(kept) == config_sha256(config)


def test_steps_are_not_refused_since_vms_run_them() -> None:
    settings = Settings(secret_keys=SETTINGS.secret_keys)
    steps = [pb.TemplateStep(type="RUN", args=["id"]), pb.TemplateStep(type="USER", args=["x"])]
    asked = pb.TemplateCreateRequest(template=template(steps=steps))
    assert len(validate(asked, settings, Sealer(settings.secret_keys)).config.steps) == 2


def test_a_build_s_place_in_the_line_says_nothing_about_the_template() -> None:
    first, batch = check().config, check(priority=pb.Batch).config
    assert (first.is_batch, batch.is_batch) == (False, True)
    assert config_sha256(first) == config_sha256(batch)


def network(access: pb.NetworkAccess, *allowed: str) -> pb.TemplateNetwork:
    return pb.TemplateNetwork(access=access, allowed=allowed)


def test_a_network_that_is_not_said_is_left_to_the_service() -> None:
    assert check().config.network is None
    assert check(network=network(pb.ServerDefault)).config.network is None
    assert config_sha256(check().config) == config_sha256(check(network=None).config)


def test_networks() -> None:
    assert check(network=network(pb.NoNetwork)).config.network == NO_NETWORK
    assert check(network=network(pb.Internet)).config.network == INTERNET
    named = check(network=network(pb.AllowedOnly, "pypi.org", "203.0.113.0/24")).config.network
    assert str(named) == "only pypi.org, 203.0.113.0/24"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (network(pb.AllowedOnly), "allowed"),
        (network(pb.Internet, "pypi.org"), "allowed"),
        (network(9), "access"),  # type: ignore[arg-type] # what a later client may send
        (network(pb.AllowedOnly, "pypi.org", "10.1.0.0/16"), "allowed[1]"),
        (network(pb.AllowedOnly, "169.254.169.254"), "allowed[0]"),
        (network(pb.AllowedOnly, "2001:db8::/32"), "allowed[0]"),
        (network(pb.AllowedOnly, "203.0.113.7/24"), "allowed[0]"),
        (network(pb.AllowedOnly, "0x7f000001"), "allowed[0]"),
        (network(pb.AllowedOnly, "metadata.google.internal"), "allowed[0]"),
        (network(pb.AllowedOnly, "localhost"), "allowed[0]"),
        (network(pb.AllowedOnly, "a b.example"), "allowed[0]"),
        (network(pb.AllowedOnly, ""), "allowed[0]"),
    ],
)
def test_networks_that_make_no_sense(wrong: pb.TemplateNetwork, field: str) -> None:
    found = refused(network=wrong)
    assert [each.field for each in found.violations] == [f"template.network.{field}"]
