from __future__ import annotations

import pytest
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.contract.registry_logins import PasswordLogin
from activities.contract.sources import FromImage
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from api.pb import template_manager_pb2 as pb
from api.server.access import Caller, Right, current_caller
from api.server.own_images import own_image, owner_of_image
from api.server.validation import validate
from tests.support.running_api import SECRET_KEYS, template_of

REGISTRY = "registry.test:5000/my/templates"


@pytest.mark.parametrize(
    ("image", "owner"),
    [
        (f"{REGISTRY}/web:1", "default"),
        (f"{REGISTRY}/web", "default"),
        (f"{REGISTRY}/web@sha256:{'a' * 64}", "default"),
        (f"{REGISTRY}/tenants/acme/web:1", "acme"),
        (f"{REGISTRY}/tenants/acme/deep/web:1", "acme"),
        (f"{REGISTRY}/tenants:1", "default"),
        (f"{REGISTRY}/base/debian:12", None),
        ("registry.test:5000/my/other:1", None),
        ("registry.test:5000/my/templates:1", None),
        (f"evil.example/{REGISTRY.partition('/')[2]}/web:1", None),
        ("debian:12", None),
        # The same registry, written otherwise.
        ("Registry.TEST:5000/my/templates/tenants/acme/web:1", "acme"),
        ("registry.test:05000/my/templates/tenants/acme/web:1", "acme"),
        ("registry.test:05000/my/templates/web:1", "default"),
        ("registry.test/my/templates/tenants/acme/web:1", None),
    ],
)
def test_whose_an_image_of_the_service_s_registry_is(image: str, owner: str | None) -> None:
    assert owner_of_image(REGISTRY, image) == owner


@pytest.mark.parametrize("registry", ["registry.test", "registry.test:443", "Registry.test:80"])
@pytest.mark.parametrize("port", ["", ":443", ":0443", ":80"])
def test_a_port_that_needs_no_saying_makes_no_other_registry(registry: str, port: str) -> None:
    assert owner_of_image(registry, f"registry.test{port}/tenants/acme/web:1") == "acme"


def test_a_name_of_our_own_is_its_tenant_s() -> None:
    for tenant in ("default", "acme"):
        assert owner_of_image(REGISTRY, own_image(REGISTRY, tenant, "web", "1")) == tenant


def test_a_secret_is_sealed_for_its_tenant() -> None:
    template = template_of()
    template.from_image_registry.general.CopyFrom(
        pb.GeneralRegistry(username="me", password="secret")
    )
    sealer = Sealer(SecretStr(SECRET_KEYS))
    mark = current_caller.set(Caller("ci", Right.BUILD, tenant="acme"))
    try:
        request = pb.TemplateCreateRequest(template=template)
        request.template.from_image = "registry.test/web:1"
        source = validate(request, Settings(), sealer).config.source
    finally:
        current_caller.reset(mark)
    assert isinstance(source, FromImage) and isinstance(source.login, PasswordLogin)
    secret = source.login.secret
    assert sealer.open(secret, SealedFor(template.build_id, "registry.test", "acme")) == "secret"
    for other in ("", "beta"):
        with pytest.raises(SealedSecretError):
            sealer.open(secret, SealedFor(template.build_id, "registry.test", other))
