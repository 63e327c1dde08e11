from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from activities.contract.names import DEFAULT_TENANT
from activities.process.tenants_file import TenantsFile
from api.errors import ApiError
from api.server.access import (
    ANONYMOUS,
    MAX_CALLERS,
    NEEDED,
    NOBODY,
    Access,
    Caller,
    CallsAtOnce,
    RateLimit,
    Right,
    TokenFileError,
    Tokens,
    address_of,
    current_caller,
    hash_token,
    parse_tokens,
    require_image,
)
from api.server.tenancy import tenant_for
from tests.support.rpcs import all_rpcs


def tokens(path: Path, *lines: str) -> Tokens:
    path.write_text("# who may do what\n" + "\n".join(lines) + "\n")
    return Tokens(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def bearer(token: str) -> dict[str, str | bytes]:
    return {"authorization": f"Bearer {token}"}


def test_every_rpc_needs_a_right_that_was_thought_of() -> None:
    assert {method.name for method in all_rpcs()} == set(NEEDED)


def test_tokens_have_rights(path: Path) -> None:
    access = Access(
        tokens(
            path,
            f"reader {hash_token('r')} read",
            f"builder {hash_token('b')} build  # of CI",
            f"boss {hash_token('a')} admin",
            f"ops {hash_token('o')} operator",
        ),
        None,
    )
    allowed = {
        name: {m for m in NEEDED if _is_admitted(access, m, token)}
        for name, token in (("reader", "r"), ("builder", "b"), ("boss", "a"), ("ops", "o"))
    }
    assert allowed["ops"] == set(NEEDED)
    assert allowed["boss"] == set(NEEDED) - {"ServiceStatusOverride"}
    assert allowed["builder"] == set(NEEDED) - {"TemplateBuildDelete", "ServiceStatusOverride"}
    assert allowed["reader"] == {m for m, right in NEEDED.items() if right <= Right.READ}


def _is_admitted(access: Access, method: str, token: str) -> bool:
    try:
        access.admit(method, bearer(token), "peer")
    except ApiError as error:
        assert error.code is grpc.StatusCode.PERMISSION_DENIED
        return False
    return True


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "TOKEN_MISSING"),
        (bearer("wrong"), "TOKEN_UNKNOWN"),
        ({"authorization": "Basic x"}, "TOKEN_UNKNOWN"),
    ],
)
def test_without_a_token_nobody_gets_in(
    path: Path, metadata: dict[str, str | bytes], reason: str
) -> None:
    access = Access(tokens(path, f"reader {hash_token('r')} read"), None)
    with pytest.raises(ApiError) as error:
        access.admit("TemplateBuildStatus", metadata, "peer")
    assert (error.value.code, error.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert access.admit("HealthStatus", metadata, "peer").right is Right.NONE


def test_a_changed_file_counts_at_once(path: Path) -> None:
    found = tokens(path, f"one {hash_token('1')} read")
    path.write_text(f"two {hash_token('2')} read\n")
    os.utime(path, (1, 1))
    assert found.find("1") is None
    assert found.find("2") == Caller("two", Right.READ)


def test_a_broken_file_keeps_the_last_good_one(path: Path) -> None:
    found = tokens(path, f"one {hash_token('1')} read")
    path.write_text("one\n")
    assert found.find("1") is not None
    path.unlink()
    assert found.find("1") is not None


@pytest.mark.parametrize("line", ["x", "x y read", f"x {'a' * 64} none", f"x {'a' * 64} write"])
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(TokenFileError, match="line 2"):
        parse_tokens(f"\n{line}\n")


def test_images_can_be_limited() -> None:
    caller = Caller("ci", Right.BUILD, ("registry.example/ci/*", "docker.io/library/debian"))
    assert caller.may_use("registry.example/ci/web:1")
    assert caller.may_use("debian:12")
    assert not caller.may_use("registry.example/other/web:1")
    assert not caller.may_use("evil.example/registry.example/ci/web")
    assert not caller.may_use("registry.example/ci/no image")
    assert ANONYMOUS.may_use("anything:1")


def test_another_image_is_denied_by_name() -> None:
    mark = current_caller.set(Caller("ci", Right.BUILD, ("a.example/*",)))
    try:
        with pytest.raises(ApiError, match=r"ci may not build from b\.example") as error:
            require_image("b.example/x:1")
    finally:
        current_caller.reset(mark)
    assert error.value.code is grpc.StatusCode.PERMISSION_DENIED


def test_the_rate_is_limited_for_each_caller() -> None:
    limit = RateLimit(per_second=2, burst=3)
    assert [limit.wait_seconds("a", now=0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.wait_seconds("b", now=0) == 0
    assert limit.wait_seconds("a", now=0.5) == 0
    assert limit.wait_seconds("a", now=0.5) == 0.5
    access = Access(None, RateLimit(per_second=1, burst=1))
    access.admit("HealthStatus", {}, "1.2.3.4")
    with pytest.raises(ApiError) as error:
        access.admit("HealthStatus", {}, "1.2.3.4")
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (error.value.reason, "1.2.3.4" in error.value.message) == ("TOO_MANY_CALLS", True)
    assert error.value.retry_after_seconds


def test_who_calls_without_a_pause_stays_limited_however_many_others_call() -> None:
    limit = RateLimit(per_second=0.001, burst=1)
    assert limit.wait_seconds("silent", now=0) == 0
    assert limit.wait_seconds("busy", now=0) == 0
    for number in range(2 * MAX_CALLERS):
        assert limit.wait_seconds(f"other {number}", now=1) == 0
        if number % (MAX_CALLERS // 2) == 0:
            assert limit.wait_seconds("busy", now=1) > 0
    assert limit.wait_seconds("silent", now=1) == 0  # forgotten: nothing is kept without a bound
    assert limit.wait_seconds(f"other {2 * MAX_CALLERS - 1}", now=1) > 0


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:1.2.3.4:5678", "1.2.3.4"),
        ("ipv6:%5B::ffff:1.2.3.4%5D:5678", "1.2.3.4"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:5678", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:1", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("unix:/run/api.sock", "unix"),
        ("unix:", "unix"),
    ],
)
def test_a_client_is_limited_by_its_address_or_its_network(peer: str, address: str) -> None:
    assert address_of(peer) == address


def test_the_tokens_of_a_tenant_share_its_rate(path: Path, tmp_path: Path) -> None:
    limits = tmp_path / "tenants.toml"
    limits.write_text("[tenants.acme]\ncalls_per_second = 0.001\ncalls_burst = 2\n")
    lines = [
        f"{t} {hash_token(t)} read tenant={of}"
        for t, of in (("x", "acme"), ("y", "acme"), ("z", "beta"))
    ]
    access = Access(tokens(path, *lines), None, TenantsFile(limits))
    for token in ("x", "y", "z", "z", "z"):
        access.admit("TemplateBuildStatus", bearer(token), "peer")
    with pytest.raises(ApiError, match="tenant acme makes too many calls") as error:
        access.admit("TemplateBuildStatus", bearer("x"), "peer")
    assert error.value.metadata == {"limit": "calls_per_second", "allowed": "0.001"}
    assert error.value.retry_after_seconds
    with pytest.raises(ApiError, match="not known"):  # costs the tenant nothing
        access.admit("TemplateBuildStatus", bearer("w"), "peer")
    limits.write_text("[tenants.acme]\ncalls_per_second = 1000\n")
    access.admit("TemplateBuildStatus", bearer("x"), "peer")


def test_a_line_names_a_tenant_and_one_without_is_of_the_default_one(path: Path) -> None:
    found = tokens(
        path,
        f"ci {hash_token('c')} build a.example/*,b.example/* tenant=acme",
        f"old {hash_token('o')} admin",
        f"ops {hash_token('x')} operator tenant=ops",
    )
    ci, old, ops = (found.find(token) for token in "cox")
    assert ci == Caller("ci", Right.BUILD, ("a.example/*", "b.example/*"), "acme")
    assert old == Caller("old", Right.ADMIN, tenant=DEFAULT_TENANT)
    assert ci and ci.sees("acme") and not ci.sees(DEFAULT_TENANT)
    assert old and old.sees(DEFAULT_TENANT) and not old.sees("acme")
    assert ops and all(map(ops.sees, ("acme", DEFAULT_TENANT, "ops")))
    assert ANONYMOUS.sees("acme")  # who has to say nothing may do everything
    assert not NOBODY.sees(DEFAULT_TENANT)


@pytest.mark.parametrize(
    "rest",
    ["tennant=acme", "tenant=", "tenant=A", "tenant=a/b", "a b", "tenant=a tenant=b", "tenant=a'b"],
)
def test_what_follows_the_rights_is_understood_or_refused(rest: str) -> None:
    with pytest.raises(TokenFileError, match="line 1"):
        parse_tokens(f"ci {hash_token('c')} build {rest}\n")


def test_a_token_is_of_one_tenant() -> None:
    line = f"ci {hash_token('c')} build tenant="
    assert len(parse_tokens(f"{line}a\n{line}a\n")) == 1
    with pytest.raises(TokenFileError, match="line 2: an earlier line"):
        parse_tokens(f"{line}a\n{line}b\n")


def test_a_certificate_counts_where_no_token_is_sent(path: Path) -> None:
    access = Access(
        tokens(
            path,
            "gate cert:gate.example read tenant=acme",
            "door cert:door.example read tenant=beta",
            f"ci {hash_token('c')} build tenant=beta",
        ),
        None,
    )
    names = {"gate.example", "10.0.0.1"}

    def caller(metadata: dict[str, str | bytes], names: set[str]) -> str:
        found = access.admit("TemplateBuildStatus", metadata, "peer", names)
        return f"{found.tenant}/{found.name}"

    assert caller({}, names) == "acme/gate"
    assert caller(bearer("c"), names) == "beta/ci"
    for metadata, wrong in (
        (bearer("wrong"), names),
        ({}, {"other.example"}),
        ({}, {"gate.example", "door.example"}),
    ):
        with pytest.raises(ApiError) as error:
            caller(metadata, wrong)
        assert error.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_wrong_tokens_are_limited_by_address(path: Path) -> None:
    access = Access(tokens(path, f"ci {hash_token('c')} read"), RateLimit(per_second=1, burst=1))
    codes = []
    for token in ("1", "2"):
        with pytest.raises(ApiError) as error:
            access.admit("TemplateBuildStatus", bearer(token), "1.2.3.4")
        codes.append(error.value.code)
    assert codes == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert access.admit("TemplateBuildStatus", bearer("c"), "1.2.3.4").name == "ci"


def test_two_of_one_name_in_two_tenants_do_not_share_a_rate(path: Path) -> None:
    lines = [f"ci {hash_token(name)} read tenant={name}" for name in ("a", "b")]
    access = Access(tokens(path, *lines), RateLimit(per_second=1, burst=1))
    assert [access.admit("HealthStatus", bearer(t), "peer").tenant for t in "ab"] == ["a", "b"]


@pytest.mark.parametrize(
    ("caller", "team", "tenant"),
    [
        (ANONYMOUS, "any label", DEFAULT_TENANT),
        (Caller("ci", Right.BUILD, tenant="acme"), "", "acme"),
        (Caller("ci", Right.BUILD, tenant="acme"), "acme", "acme"),
        (Caller("ops", Right.OPERATOR), "acme", "acme"),
        (Caller("ops", Right.OPERATOR), "", DEFAULT_TENANT),
        (Caller("ci", Right.ADMIN, tenant="acme"), "beta", "TEAM_NOT_YOURS"),
        (Caller("old", Right.ADMIN), "beta", "TEAM_NOT_YOURS"),
        (Caller("ops", Right.OPERATOR), "no/tenant", "INVALID_REQUEST"),
    ],
)
def test_a_request_is_for_the_caller_s_tenant(caller: Caller, team: str, tenant: str) -> None:
    mark = current_caller.set(caller)
    try:
        told = tenant_for(team)
    except ApiError as error:
        told = error.reason
    finally:
        current_caller.reset(mark)
    assert told == tenant


def test_so_many_calls_of_a_caller_at_once() -> None:
    at_once = CallsAtOnce(2)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(at_once.one("default/ci"))
        with (
            pytest.raises(ApiError, match="default/ci has 2 calls") as error,
            at_once.one("default/ci"),
        ):
            pass
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.value.retry_after_seconds
        with at_once.one("default/other"):
            pass
    with at_once.one("default/ci"):
        pass
    assert at_once == CallsAtOnce(2)  # nothing is kept of who has gone
