"""What the live page shows where there is more to show: keys, models, a scaler, promises, GPUs."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import msgspec
import pytest
from playwright.async_api import Page, async_playwright, expect

from router.scaling.autoscaler import ScalingState
from serving.engine.hardware_watch import GpuState, HardwareState
from serving.gateway.observe.state import ScalerState
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.serving.gateway.seen.page.browser import ARGUMENTS, MODULES, install_browser
from tests.support.fakes import INFO
from tests.support.running_gateway import CHAT, System, running

pytestmark = pytest.mark.timeout(120)


@contextlib.asynccontextmanager
async def opened(system: System) -> AsyncIterator[Page]:
    """The gateway's page in a browser of its own."""
    path = await asyncio.to_thread(install_browser)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        page = await browser.new_page(locale="en-US", viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.goto(f"{system.client.base_url}/headway/")
        yield page
        assert problems == []
        assert await violations(page) == []
        system.gateway.close_feeds()
        await browser.close()


async def violations(page: Page) -> list[tuple[str, str]]:
    """What breaks axe's rules, light and dark."""
    await page.evaluate((MODULES / "axe-core" / "axe.min.js").read_text())
    found = []
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        found += await page.evaluate("axe.run().then((result) => result.violations)")
    return [(each["id"], each["nodes"][0]["html"]) for each in found]


async def test_an_admin_gives_the_key_and_drains_by_the_keyboard(tmp_path):
    with KeysFile(tmp_path / "keys.json") as file:
        for tenant, admin in (("ops", True), ("acme", False)):
            text, key = make_key(tenant, admin=admin)
            file.keys.append(key)
            (tmp_path / tenant).write_text(text)
        file.save()
    auth = {"keys_file": str(tmp_path / "keys.json")}
    async with running(auth=auth) as system, opened(system) as page:
        await expect(page.locator("#link")).to_have_text("a key is needed")
        await page.fill("#key", (tmp_path / "acme").read_text())
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-error")).to_contain_text("admin")
        await page.fill("#key", (tmp_path / "ops").read_text())
        await page.keyboard.press("Enter")
        await expect(page.locator("#link")).to_have_text("live")
        row = page.locator('[data-engine="r0"]')
        await page.get_by_role("button", name="Drain r0").focus()
        for state, words, button in (
            ("drained by an admin", "gets no new work", "Take back r0"),
            ("ready", "gets work again", "Drain r0"),
        ):
            await page.keyboard.press("Enter")  # where the focus has stayed
            await expect(row.locator(".state")).to_have_text(state)
            await expect(page.locator("#order-said")).to_contain_text(words)
            await expect(page.get_by_role("button", name=button)).to_be_focused()


async def test_what_is_pressed_is_still_there_when_it_is_let_go():
    """Frames come twice a second, and a slow click takes longer."""
    async with running(num_engines=1) as system, opened(system) as page:
        button = await page.get_by_role("button", name="Drain r0").bounding_box()
        assert button is not None
        await page.mouse.move(button["x"] + 5, button["y"] + 5)
        await page.mouse.down()
        await asyncio.sleep(1.2)  # two frames
        await page.mouse.up()
        await expect(page.locator('[data-engine="r0"] .state')).to_have_text("drained by an admin")


async def test_a_server_is_drained_by_its_address():
    async with running(num_engines=1) as system, opened(system) as page:
        await system.rename_engine("127.0.0.1:8101")
        await page.get_by_role("button", name="Drain 127.0.0.1:8101").click()
        row = page.locator('[data-engine="127.0.0.1:8101"]')
        await expect(row.locator(".state")).to_have_text("drained by an admin")


async def test_models_promises_scaler_and_gpus():
    async with running(num_engines=0) as system:
        one, other = (
            msgspec.structs.replace(INFO, model=model, max_num_seqs=1) for model in ("one", "other")
        )
        engine = await system.add_engine(info=one)
        await system.add_engine(info=other)
        engine.gate.clear()
        gateway = system.gateway
        gpu = GpuState(
            uuid="GPU-0",
            name="NVIDIA H100",
            num_bytes=80 << 30,
            num_free_bytes=16 << 30,
            utilization=0.87,
            power_w=412.3,
            temperature_c=61,
        )
        slow = HardwareState(gpus=(gpu,), slow="its GPU is slowed down by heat")
        gateway.driver.engines.hardware["r0"] = slow
        gateway.scalers[""] = ScalerState(
            wanted=ScalingState(num_wanted=3, expected_load=1.7, recent_load=1.25, start_s=0.0),
            num_running=2,
            ready_in_s=12.0,
        )
        async with opened(system) as page:
            body = system.chat(model="one", max_tokens=1)
            headers = {"x-headway-class": "interactive"}
            asked = [
                asyncio.create_task(system.client.post(CHAT, json=body, headers=headers))
                for _ in range(3)
            ]
            held = page.locator('[data-class="interactive"] td')
            await expect(held.first).to_have_text("2")
            waiting = gateway.state().held.by_class["interactive"]
            assert waiting.num_requests == 2
            await expect(held.nth(1)).to_have_text(f"{waiting.num_tokens} tokens")
            await expect(held.last).to_have_text("2 late", timeout=20_000)  # once that is so
            models = page.locator("#models tbody tr")
            await expect(models).to_have_count(2)
            await expect(models.first).to_contain_text(f"{waiting.num_tokens} tokens")
            await expect(models.last).to_contain_text("ready")
            row = page.locator('[data-engine="r0"]')
            await expect(row).to_contain_text("87 % busy, 64 of 80 GiB, 412 W, 61 °C")
            await expect(row).to_contain_text("slowed down by heat")
            scaling = page.locator("#scaling-now dl")
            for words in ("engines wanted3", "engines there2", "load of late1.25 engines"):
                await expect(scaling).to_contain_text(words)
            chart = page.locator("#charts div", has=page.get_by_text("Load, in engines"))
            await expect(chart.locator("canvas")).to_be_visible()
            engine.gate.set()
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
            await expect(page.locator("#held-none")).to_be_visible()
            # What came is beside what was predicted: by the engine that gave it.
            lasted = row.locator("td", has_text=re.compile(" ms / "))
            await expect(lasted).to_have_count(1)
