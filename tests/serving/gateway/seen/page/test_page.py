"""The live page in a real browser, before a gateway in front of emulated engines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.gateway.seen.page.browser import ARGUMENTS, MODULES, install_browser
from tests.support.running_gateway import CHAT, free_port

ROOT = Path(__file__).resolve().parents[5]
STATIC = ROOT / "serving" / "gateway" / "observe" / "page" / "static"
NUM_ENGINES = 8

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run `make serve-emulated`, with two gateways."""
    install_browser()
    port = free_port()
    log = tmp_path_factory.mktemp("page") / "log"
    with log.open("w") as output:
        served = subprocess.Popen(
            ["make", "serve-emulated", f"ARGS=--port {port} --set gateway.replicas=2"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "\nready after " not in log.read_text():
            assert served.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(served.pid, signal.SIGINT)
        served.wait(60)
    assert "] Error" not in log.read_text()


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=install_browser(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, live; a test fails if it has said anything to the console that is an error."""
    page = browser.new_page(locale="en-US", viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(url + "/")
    expect(page.locator("#link")).to_have_text("live")
    yield page
    page.close()
    assert problems == []


def picture(page: Page, name: str, part: str | None = None) -> None:
    """Keep a picture of the page, or a part, for the documents: `make pictures` names a folder."""
    if folder := os.environ.get("HEADWAY_PICTURES"):
        page.set_viewport_size({"width": 1280, "height": 1300})
        shown = page if part is None else page.locator(part)
        shown.screenshot(path=Path(folder) / name)


def state(url: str) -> Any:
    return httpx.get(url + "/headway/state").json()


def test_values_are_those_of_the_state(page: Page, url: str) -> None:
    assert page.url == url + "/headway/"
    engines = state(url)["replicas"]
    rows = page.locator("#engine-rows tr")
    expect(rows).to_have_count(NUM_ENGINES)
    for engine, replica in engines.items():
        row = page.locator(f'[data-engine="{engine}"]')
        expect(row.locator(".state")).to_have_text("ready")
        expect(row).to_contain_text(replica["info"]["device"])
        rate = round(replica["prefill_tokens_per_s"])
        expect(row).to_contain_text(f"{rate:,} tokens/s")
    expect(page.locator("#about")).to_contain_text("policy headway")


def test_all_gateways_are_shown_together(page: Page, url: str) -> None:
    expect(page.locator("#about")).to_contain_text("2 of 2 gateways")
    rows = page.locator("#gateway-rows tr")
    expect(rows).to_have_count(2)
    for rank, gateway in enumerate(sorted(state(url)["gateways"].values(), key=_rank)):
        expect(rows.nth(rank).locator("th")).to_have_text(f"{rank} ({gateway['gateway_id']})")
        expect(rows.nth(rank).locator(".state")).to_have_text("answers")


def _rank(gateway: Any) -> int:
    return gateway["rank"]


def test_an_engine_is_drained_and_taken_back_on_all_gateways(page: Page, url: str) -> None:
    engine = next(iter(state(url)["replicas"]))
    shown = page.locator(f'[data-engine="{engine}"] .state')
    for order, words, drained in (
        ("Drain", "drained by an admin", [engine]),
        ("Take back", "ready", []),
    ):
        page.get_by_role("button", name=f"{order} {engine}").click()
        expect(shown).to_have_text(words)
        gateways = state(url)["gateways"].values()
        assert [each["drained"] for each in gateways] == [drained] * 2


def test_a_request_is_sent_and_its_way_shown(page: Page) -> None:
    page.fill("#play-prompt", "What is the capital of France?")
    page.fill("#play-tokens", "12")
    page.get_by_role("button", name="Send").click()
    way = page.locator("#play-way li")
    expect(way.filter(has_text="first token predicted after")).to_have_count(1)
    expect(way.last).to_contain_text("completed")
    assert page.locator("#play-answer").inner_text().strip()
    # And among the others, where its way opens with the keyboard.
    button = page.locator("#request-rows button").first
    expect(button).to_have_text(re.compile("^play-"))
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#way li").first).to_contain_text("arrived")


def test_a_held_request_says_why(page: Page, url: str) -> None:
    """More long prompts than the engines may begin: the rest is held, for a reason."""
    question = {
        "model": next(iter(state(url)["replicas"].values()))["info"]["model"],
        "messages": [{"role": "user", "content": "word " * 20_000}],
        "max_tokens": 1,
    }
    clients = subprocess.Popen(
        [sys.executable, "-c", _SEND, url + CHAT], stdin=subprocess.PIPE, text=True
    )
    assert clients.stdin is not None
    clients.stdin.write(json.dumps(question))
    clients.stdin.close()
    reason = page.locator("#request-rows td.words", has_text=f"of {NUM_ENGINES} engines").first
    held = page.locator("#held-rows tr[data-class=standard]")
    # At the same time: who is held is not for long.
    expect(page.locator("main", has=held).filter(has=reason)).to_be_visible(timeout=20_000)
    picture(page, "page.png")
    assert clients.wait(60) == 0
    row = page.locator("#request-rows tr", has_text=f"of {NUM_ENGINES} engines").first
    row.get_by_role("button").click()
    way = page.locator("#way li")
    for number, words in enumerate(("arrived", "held", "sent to", "first token from", "over")):
        expect(way.nth(number)).to_contain_text(words)
    expect(way.nth(2)).to_contain_text("first token predicted after")
    picture(page, "request.png", "#way")


_SEND = """
import asyncio, sys
import httpx
async def main():
    body = sys.stdin.read()
    bodies = [body.replace("word", f"{number}", 1) for number in range(60)]  # none is cached
    async with httpx.AsyncClient(timeout=60) as client:
        replies = await asyncio.gather(*(
            client.post(sys.argv[1], content=each, headers={"content-type": "application/json"})
            for each in bodies
        ))
    assert {reply.status_code for reply in replies} <= {200, 429}, replies
asyncio.run(main())
"""


def test_it_is_for_everybody(page: Page) -> None:
    """Axe's rules, light and dark, wide and on a phone."""
    axe = (MODULES / "axe-core" / "axe.min.js").read_text()
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 375)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate(axe)
        found = page.evaluate("axe.run().then((result) => result.violations)")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], "a phone has to scroll sideways"


def test_a_killed_engine_turns_red(page: Page, url: str) -> None:
    """Within two seconds, as long as the feed's next frame included."""
    engine, replica = next(iter(state(url)["replicas"].items()))
    os.kill(replica["info"]["pid"], signal.SIGKILL)
    expect(page.locator(f'[data-engine="{engine}"] .state.bad')).to_be_visible(timeout=2000)


def test_what_comes_from_npm_is_npms() -> None:
    install_browser()
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        theirs = MODULES / "uplot" / "dist" / name
        assert (STATIC / "vendor" / name).read_bytes() == theirs.read_bytes()
