from __future__ import annotations

from activities.contract.image_steps import PersistedStep, Run, image_step
from activities.contract.scope import BuildScope, HostLease
from activities.image.docker_steps import ImageState
from tests.support.persisted import lines_of

BUILD = "11111111-1111-4111-8111-111111111111"


def test_what_an_earlier_version_has_made_of_a_step_is_found_again() -> None:
    steps = [
        image_step(PersistedStep.model_validate_json(line))
        for line in lines_of("image_steps.jsonl")
    ]
    base = ImageState(
        image_id="sha256:" + "b" * 64,
        key="sha256:" + "a" * 64,
        environment={},
        user="",
        working_dir="/",
    )
    scope = scope_of("default")
    keys = [base.next_key(step, scope) for step in steps]
    assert keys == lines_of("image_step_keys.txt")


def scope_of(tenant: str) -> BuildScope:
    lease = HostLease(host="h1", number=1)
    return BuildScope(build_id=BUILD, template_id="web", lease=lease, tenant=tenant)


def test_what_a_tenant_s_step_has_made_is_its_own() -> None:
    base = ImageState("sha256:" + "b" * 64, "sha256:" + "a" * 64, {}, "", "/")
    step = Run(command="make")
    keys = {base.next_key(step, scope_of(tenant)) for tenant in ("default", "acme", "beta")}
    assert len(keys) == 3
