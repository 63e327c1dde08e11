"""E2B's SDK, as it is on PyPI, builds templates on the whole product.

What a template has is asked by a last RUN in its own guest: a wrong answer fails the build. Three
templates are built in `make test`, the others in `make test-e2b`, with each version.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import requests
from devstack.registry import Layer, running_registry

from activities.store.objects import metadata_name
from tests.support.e2b_sdk import VERSIONS, sdk_of
from tests.support.local_http import HTTPD, HTTPD_ANSWERS
from tests.support.real_stack import Product, nothing_left
from tests.support.registry_login import HTPASSWD, PASSWORD, USER

pytestmark = pytest.mark.counts_host

OLD, NEW = VERSIONS

whole = pytest.mark.whole
both = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def name() -> str:
    return f"t-{uuid.uuid4().hex[:8]}"


async def build(
    product: Product, version: str, place: Path, name: str, template: str
) -> dict[str, Any]:
    """Build a template, of which `template` is what follows `Template()`; returns what is told."""
    [told] = await sdk_of(product, version).run(
        place,
        f"""
        template = Template(){template}
        lines = []
        try:
            built = Template.build(template, "{name}", **SMALL, on_build_logs=lines.append)
            tell(build=built.build_id, failed="", log=[str(line) for line in lines])
        except BuildException as error:
            tell(failed=str(error), line=line_of(error), log=[str(line) for line in lines])
        """,
    )
    return told


def userland() -> bytes:
    """Return the layer of a small image with a shell and accounts."""
    layer = Layer().directory("bin").directory("etc").busybox().symlink("bin/sh", "busybox")
    return (
        layer.add("etc/passwd", b"root:x:0:0::/:/bin/sh\n").add("etc/group", b"root:x:0:\n").tar()
    )


def context(place: Path) -> None:
    """Make the files that templates copy."""
    (place / "app" / "sub").mkdir(parents=True)
    (place / "app" / "main").write_text("main")
    (place / "app" / "sub" / "more").write_text("more")
    (place / "app" / "script").write_text("#!/bin/sh\necho ran\n")
    (place / "app" / "script").chmod(0o755)
    (place / "app" / "link").symlink_to("main")
    (place / "one.txt").write_text("1")
    (place / "two.txt").write_text("2")
    (place / "other").write_text("other")


# ---- In `make test`


async def test_a_template_with_files_serves_and_another_stands_on_it(
    product: Product, image: str, name: str, tmp_path: Path
) -> None:
    context(tmp_path)
    with nothing_left(product, keep=("",)):
        first = await build(
            product,
            NEW,
            tmp_path,
            name,
            f""".from_image("{image}").set_user("root")
        template.set_workdir("/srv").set_envs({{"A": "1"}}).copy("app", "app")
        template.run_cmd('test "$(cat app/sub/more)$A$(pwd)" = more1/srv')
        template = template.set_start_cmd("{HTTPD}", "{HTTPD_ANSWERS}")""",
        )
        assert not first["failed"], first
        assert any("guest is ready" in line for line in first["log"])
        status = product.status(first["build"])
        assert (status["state"], status["template_id"]) == ("completed", name)
        second = await build(
            product,
            OLD,
            tmp_path,
            f"{name}-2",
            f""".from_template("{name}").set_user("root").run_cmd("test -f /srv/app/main")""",
        )
        assert not second["failed"], second


async def test_a_failing_step_is_told_with_the_line_that_wrote_it(
    product: Product, image: str, name: str, tmp_path: Path
) -> None:
    told = await build(
        product,
        OLD,
        tmp_path,
        name,
        f""".from_image("{image}").set_user("root")
        template.run_cmd("echo so far; exit 7")  # this one
        template.run_cmd("true")""",
    )
    assert "exit code 7" in told["failed"]
    assert told["line"].endswith("# this one")
    assert any("so far" in line for line in told["log"])


def test_the_process_tells_how_it_is_and_what_it_has_answered(product: Product) -> None:
    address = product.stack.variables["TEMPLATE_MANAGER_REST_ADDRESS"]
    [health], [metrics] = product.health, product.metrics
    told = [requests.get(f"http://{health}{path}", timeout=30) for path in ("/livez", "/readyz")]
    assert [answer.status_code for answer in told] == [200, 200], [each.text for each in told]
    asked = requests.get(
        f"http://{address}/templates/aliases/none", headers={"X-API-KEY": "e2b_0"}, timeout=30
    )
    assert asked.status_code == 404
    counted = requests.get(metrics, timeout=30).text
    assert 'template_manager_rest_request_seconds_count{method="GET"' in counted
    assert 'path="/templates/aliases/{template_id}"' in counted
    first = product.stack.pid("rest")
    product.stack.restart("rest")
    assert product.stack.pid("rest") != first
    assert "stopped" in [line["event"] for line in product.process_log("rest")]  # it drained


# ---- In `make test-e2b`

STEPS = {
    "envs": ('.set_envs({"A": "x y", "B": "2"})', 'test "$A$B" = "x y2"'),
    "variables that name others": (
        '.set_envs({"A": "1", "B": "$A"}).set_envs({"C": "$A/${A}x", "D": "$C", "P": "$PATH:/p"})',
        'test "$A:$B:$C:$D" = 1::1/1x: && case $P in /*:/p) ;; *) false ;; esac',
    ),
    "workdir": ('.set_workdir("/srv/new")', "test $(pwd) = /srv/new"),
    "user": ('.set_user("nobody")', "test $(id -un) = nobody"),
    "run as a user": (
        """.run_cmd('test $(id -un) = nobody', user="nobody")""",
        "test $(id -un) = root",
    ),
    "a file": ('.copy("one.txt", "/srv/")', "test $(cat /srv/one.txt) = 1"),
    "a file by another name": ('.copy("one.txt", "/srv/x")', "test $(cat /srv/x) = 1"),
    "a directory": ('.copy("app", "/srv/app")', "test $(/srv/app/script) = ran"),
    "a glob": (
        '.copy("*.txt", "/srv/")',
        'test "$(cat /srv/one.txt /srv/two.txt)" = 12 -a ! -e /srv/other',
    ),
    "links": ('.copy("app", "/srv/app")', "test $(readlink /srv/app/link) = main"),
    "links followed": (
        '.copy("app", "/srv/app", resolve_symlinks=True)',
        "test ! -L /srv/app/link -a -f /srv/app/link",
    ),
    "owner and mode": (
        '.copy("one.txt", "/srv/", user="nobody", mode=0o640)',
        "test $(stat -c %U-%a /srv/one.txt) = nobody-640",
    ),
    "several files": (
        '.copy(["one.txt", "two.txt"], "/srv/")',
        "test -f /srv/one.txt -a -f /srv/two.txt",
    ),
    "file commands": (
        '.make_dir("/srv/d/e", mode=0o700).make_symlink("/srv/d", "/srv/l")'
        '.rename("/srv/l", "/srv/m").remove("/srv/d", recursive=True)',
        "test -L /srv/m -a ! -e /srv/d",
    ),
    "a large file": ('.copy("large", "/srv/")', "test $(stat -c %s /srv/large) = 8388608"),
}
"""What follows `from_image(…)` and `set_user("root")`, and the question that a last RUN asks."""


@whole
@both
@pytest.mark.parametrize(("steps", "question"), STEPS.values(), ids=list(STEPS))
async def test_steps(
    product: Product,
    image: str,
    name: str,
    version: str,
    steps: str,
    question: str,
    tmp_path: Path,
) -> None:
    context(tmp_path)
    if "large" in steps:
        (tmp_path / "large").write_bytes(os.urandom(8 << 20))
    base = f'.from_image("{image}").set_user("root")'
    asked = f"{base}{steps}.run_cmd({question!r})"
    told = await build(product, version, tmp_path, name, asked)
    assert not told["failed"], told


@whole
@both
async def test_a_template_that_names_no_user_is_user_s_and_so_is_what_stands_on_it(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    question = "test $(id -un):$(pwd):$HOME = user:/home/user:/home/user"
    start, ready = f"id -un >who; exec {HTTPD}", f"{HTTPD_ANSWERS} && test $(cat who) = user"
    asked = f""".from_image("{image}").set_envs({{"A": "1"}}).copy("one.txt", "here")
        template.run_cmd({question!r}).run_cmd("test $(stat -c %U here) = user")
        template = template.set_start_cmd({start!r}, {ready!r})"""
    context(tmp_path)
    first = await build(product, version, tmp_path, name, asked)
    assert not first["failed"], first
    asked = f""".from_template("{name}").run_cmd({question!r}).run_cmd("test -f here -a $A = 1")"""
    second = await build(product, version, tmp_path, f"{name}-2", asked)
    assert not second["failed"], second
    for built in (first, second):
        told = metadata_of(product, built["build"])
        running = told["start"]
        assert (running["start_command"], running["ready_command"]) == (start, ready)
        assert (told["context"]["user"], told["context"]["workdir"]) == ("user", "/home/user")
        assert told["context"]["env_vars"]["A"] == "1"
        assert running["context"] == told["context"]
    assert told["from_template"] == {"alias": name, "build_id": first["build"]}


def metadata_of(product: Product, build_id: str) -> dict[str, Any]:
    """Return what is published of a template, as an orchestrator reads it."""
    found = product.bucket.read_object(metadata_name(build_id))
    assert found is not None
    told: dict[str, Any] = json.loads(found[0])
    return told


@whole
@both
async def test_a_dockerfile(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    context(tmp_path)
    (tmp_path / "Dockerfile").write_text(
        f"FROM {image}\nENV A=1 B=2\nWORKDIR /srv\nCOPY one.txt ./here\n"
        'RUN test "$A$B$(cat here)$(pwd)" = 121/srv\nUSER root\nWORKDIR /\n'
    )
    told = await build(product, version, tmp_path, name, '.from_dockerfile("Dockerfile")')
    assert not told["failed"], told


@whole
@both
async def test_what_is_built_again_is_found_unless_the_cache_is_skipped(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    told = await sdk_of(product, version).run(
        tmp_path,
        f"""
        for skip in (False, False, True):
            template = Template().from_image("{image}").set_user("root")
            template.run_cmd("echo {name}; date >/srv/made")
            lines = []
            Template.build(
                template, "{name}", **SMALL, skip_cache=skip, on_build_logs=lines.append
            )
            tell(log=[str(line) for line in lines])
        """,
    )
    # The root file system of the image may be another test's; the step is this one's alone.
    used = [
        any("used again" in line and "root file system" not in line for line in each["log"])
        for each in told
    ]
    assert used == [False, True, False]


@whole
@both
async def test_a_private_registry(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    directory = tmp_path / "registry"
    directory.mkdir()
    with running_registry(directory, htpasswd=HTPASSWD) as registry:
        registry.login = (USER, PASSWORD)
        registry.push("private", [userland()])
        private = f"{registry.address}/private:latest"
        login = f'username="{USER}", password="{PASSWORD}"'
        run = '.set_user("root").run_cmd("true")'
        told = await build(
            product, version, tmp_path, name, f'.from_image("{private}", {login}){run}'
        )
        assert not told["failed"], told
        wrong = login.replace(PASSWORD, "wrong")
        told = await build(
            product, version, tmp_path, name, f'.from_image("{private}", {wrong}){run}'
        )
        assert told["failed"]
        assert PASSWORD not in str(told)


@whole
@both
async def test_a_start_command_that_fails_is_told(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    told = await build(
        product,
        version,
        tmp_path,
        name,
        f""".from_image("{image}").set_user("root")
        template.run_cmd("true")
        template = template.set_start_cmd("/bin/none", "sleep 1; false")  # the last""",
    )
    assert "not found" in told["failed"]
    assert told["line"].endswith("# the last")


@whole
@both
async def test_an_image_that_is_not_there_is_told_at_the_base(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    told = await build(
        product,
        version,
        tmp_path,
        name,
        f""".from_image("{product.registry}/none:1")  # the base
        template.run_cmd("true")""",
    )
    assert "none" in told["failed"]
    assert told["line"].endswith("# the base")


@whole
@both
async def test_many_at_once_by_the_asynchronous_sdk(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    told = await sdk_of(product, version).run(
        tmp_path,
        f"""
        async def one(number):
            template = AsyncTemplate().from_image("{image}").set_user("root")
            template.run_cmd(f"echo {{number}} >/srv/number")
            return await AsyncTemplate.build(template, f"{name}-{{number}}", **SMALL)

        async def all():
            return await asyncio.gather(*(one(number) for number in range(3)))

        for built in asyncio.run(all()):
            tell(build=built.build_id, there=Template.exists(built.name))
        """,
    )
    assert [each["there"] for each in told] == [True] * 3
    assert {product.status(each["build"])["state"] for each in told} == {"completed"}


@whole
@both
async def test_names_and_tags(
    product: Product, image: str, name: str, version: str, tmp_path: Path
) -> None:
    told = await sdk_of(product, version).run(
        tmp_path,
        f"""
        def build(name, tags, line):
            template = Template().from_image("{image}").set_user("root").run_cmd(line)
            return Template.build(template, name, tags=tags, **SMALL).build_id

        def tags():
            return {{each.tag: str(each.build_id) for each in Template.get_tags("{name}")}}

        one = build("{name}:v1", None, "echo 1 >/made")
        tell(one=one, tags=tags())
        two = build("{name}", ["v2", "stable"], "echo 2 >/made")
        tell(two=two, tags=tags())
        Template.assign_tags("{name}:v1", ["stable", "old"])
        tell(tags=tags())
        Template.remove_tags("{name}", ["old"])
        tell(tags=tags())
        stable = Template().from_template("{name}:stable").set_user("root")
        Template.build(stable.run_cmd("grep 1 /made"), "{name}-2", **SMALL)
        tell(exists=[Template.exists(each) for each in ("{name}", "{name}-2", "{name}-3")])
        """,
    )
    first, second, moved, taken, there = told
    one, two = first["one"], second["two"]
    assert first["tags"] == {"v1": one}
    assert second["tags"] == {"v1": one, "v2": two, "stable": two}
    assert moved["tags"] == {"v1": one, "v2": two, "stable": one, "old": one}
    assert taken["tags"] == {"v1": one, "v2": two, "stable": one}
    assert there["exists"] == [True, True, False]
    pulled = product.cli("pull", f"{name}:v2", str(tmp_path / "pulled"))
    assert pulled.code == 0, pulled.err
