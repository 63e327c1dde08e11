"""What a person sees in Temporal's Web UI, in Chromium: a finished, a failed, a running build."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import images
import pytest
from playwright.sync_api import Error, Page, expect, sync_playwright

from activities.contract.names import build_workflow_id
from tests.support.real_stack import Product, nothing_left, running_product

pytestmark = pytest.mark.counts_host

CHROMIUM = "/usr/bin/chromium"
COLUMNS = ("Status", "TemplateId", "TemplateImage", "BuildState", "BuildStep", "KvmHost")
WAIT_MS = 30_000
# The picture in `docs/`; pytest keeps it in the test's directory. Take it from a run in a clone at
# /opt/template-manager: the stack trace in it tells where the code was.
SCREENSHOT = "web-ui-failed-build.png"


@dataclass(frozen=True)
class Builds:
    """Three builds in the three states that one looks at."""

    product: Product
    image: str
    finished: str
    failed: str
    running: str

    def address(self, build_id: str, tab: str) -> str:
        ui = self.product.stack.variables["TEMPLATE_MANAGER_WEB_UI_ADDRESS"]
        run_id = self.product.status(build_id)["run_id"]
        return f"{ui}/namespaces/default/workflows/{build_workflow_id(build_id)}/{run_id}/{tab}"


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    with running_product() as product:
        image = images.make_and_push("busybox", product.registry, lambda _: None)
        with nothing_left(product):
            finished = product.build(image, "--template-id", "web-finished")
            failed = product.build(
                image, "--template-id", "web-failed", start="/bin/serve --port 80"
            )
            product.ended(finished)
            product.ended(failed)
            running = product.build(
                image, "--template-id", "web-running", ready="/bin/busybox false"
            )
            product.until(running, lambda status: status["step"] == "boot_and_snapshot")
            yield Builds(product, image, finished, failed, running)
            for build_id in (finished, failed, running):
                assert product.cli("delete", build_id).code == 0


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        made = browser.new_page(viewport={"width": 1600, "height": 1000})
        made.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        yield made
        browser.close()


def test_the_list_shows_template_image_state_step_and_host(page: Page, builds: Builds) -> None:
    columns = json.dumps({"default": [{"label": label} for label in COLUMNS]})
    page.add_init_script(
        f"localStorage.setItem('namespace-workflow-table-columns', {json.dumps(columns)})"
    )
    ui = builds.product.stack.variables["TEMPLATE_MANAGER_WEB_UI_ADDRESS"]
    page.goto(f'{ui}/namespaces/default/workflows?query=`WorkflowType`="BuildTemplate"')
    for state, template in (
        ("completed", "web-finished"),
        ("failed", "web-failed"),
        ("building", "web-running"),
    ):
        row = page.get_by_role("row").filter(has_text=template)
        for told in (builds.image, state):
            expect(row).to_contain_text(told)
    running = page.get_by_role("row").filter(has_text="web-running")
    expect(running).to_contain_text("boot_and_snapshot")
    [host] = builds.product.cli("hosts", "--json").json["hosts"]
    expect(running).to_contain_text(host)


def expect_somewhere(page: Page, *texts: str) -> None:
    """Wait until each text is on the page; the UI shows markdown in frames of their own."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while True:
        shown = ""
        for frame in page.frames:
            with contextlib.suppress(Error):  # it has just been replaced
                shown += frame.locator("body").inner_text(timeout=1000)
        missing = [text for text in texts if text not in shown]
        if not missing:
            return
        assert time.monotonic() < deadline, f"{missing} not in {shown}"
        page.wait_for_timeout(200)


def test_a_finished_build(page: Page, builds: Builds) -> None:
    page.goto(builds.address(builds.finished, "history?per-page=250"))
    expect(page.locator("body")).to_contain_text("Completed")
    expect_somewhere(page, f"pull {builds.image}", "make rootfs.ext4 of", "boot 1 vCPU 256 MiB")
    page.goto(builds.address(builds.finished, "timeline"))
    expect_somewhere(page, "upload_artifacts", "upload ")  # how much, behind the name
    page.goto(builds.address(builds.finished, "user-metadata"))
    expect_somewhere(page, f"web-finished · {builds.image}")


def test_a_failed_build_says_what_to_do(page: Page, builds: Builds, tmp_path: Path) -> None:
    page.goto(builds.address(builds.failed, "history"))
    body = page.locator("body")
    for told in ("exit code 127", "/bin/serve", "what to do:", "Run the command"):
        expect(body).to_contain_text(told)
    page.screenshot(path=tmp_path / SCREENSHOT)


def test_a_running_build_tells_how_far_it_is(page: Page, builds: Builds) -> None:
    page.goto(builds.address(builds.running, "user-metadata"))
    expect_somewhere(
        page, f"web-running · {builds.image}", "build_rootfs", "boot_and_snapshot", "running"
    )
    page.goto(builds.address(builds.running, "pending-activities"))
    expect_somewhere(page, "wait_until_ready")
