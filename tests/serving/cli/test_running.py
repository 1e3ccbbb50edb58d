"""What is asked of a running service: by a gateway with fake engines, over HTTP."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import msgspec
import pytest
from textual.widgets import DataTable, Static
from typer.testing import CliRunner

from router.scaling.autoscaler import ScalingState
from serving.cli.main import main
from serving.cli.running.rows import TokenRates, engine_rows
from serving.cli.running.service import RunningService
from serving.cli.running.top import Top
from serving.gateway.observe.state import ScalerState
from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.fakes import INFO
from tests.support.running_gateway import CHAT, System, running, running_together

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with running(num_engines=2) as system:
        yield system


async def run(*arguments: str) -> tuple[int, str, str]:
    """Run a command beside the gateway, which needs this event loop."""
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    return result.exit_code, result.stdout, result.stderr


def url_of(system: System) -> str:
    return str(system.client.base_url)


class TestStatus:
    async def test_shows_engines_and_outcomes(self, system: System) -> None:
        await system.client.post(CHAT, json=system.chat(max_tokens=2))
        code, shown, _ = await run("status", "--url", url_of(system) + "/v1/")
        assert code == 0
        assert "1 completed" in shown
        lines = [line.split() for line in shown.splitlines() if line.startswith("r")]
        assert [line[:2] for line in lines] == [["r0", "ready"], ["r1", "ready"]]

    async def test_says_who_waits_and_what_the_autoscaler_wants(self) -> None:
        async with running(num_engines=0) as system:
            wanted = ScalingState(num_wanted=3, recent_load=1.25, expected_load=1.7, start_s=40.0)
            system.gateway.scalers[""] = ScalerState(wanted=wanted, num_running=2)
            engine = await system.add_engine(info=msgspec.structs.replace(INFO, max_num_seqs=1))
            engine.gate.clear()
            asked = [
                asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=1)))
                for _ in range(3)
            ]
            await system.until(lambda: system.gateway.state().held.num_requests == 2)
            _, shown, _ = await run("status", "--url", url_of(system))
            engine.gate.set()
            await asyncio.gather(*asked)
        assert re.search(r"^held, standard +2, the oldest for \d+\.\d s *$", shown, re.M)
        assert re.search(r"^engines +2 there, 3 wanted: load 1\.25, 1\.70 in 40 s *$", shown, re.M)

    async def test_as_json_is_the_state(self, system: System) -> None:
        code, shown, _ = await run("status", "--url", url_of(system), "--json")
        assert code == 0
        assert set(json.loads(shown)["replicas"]) == {"r0", "r1"}

    async def test_exits_with_3_while_no_engine_is_ready(self) -> None:
        async with running(num_engines=0) as system:
            assert (await run("status", "--url", url_of(system)))[0] == 3

    async def test_mistakes_take_one_line(self, tmp_path) -> None:
        code, _, said = await run("status", "--url", NOBODY)
        assert code == 1
        assert f"{NOBODY} does not answer (Connection refused): is `headway serve` running" in said
        with KeysFile(path := tmp_path / "keys.json") as file:
            text, key = make_key("ops", admin=True)
            file.keys.append(key)
            file.save()
        async with running(num_engines=1, auth={"keys_file": str(path)}) as system:
            code, _, said = await run("status", "--url", url_of(system))
            assert (code, len(said.splitlines())) == (1, 1)
            assert "--api-key or HEADWAY_API_KEY" in said
            assert (await run("status", "--url", url_of(system), "--api-key", text))[0] == 0


class TestExplain:
    async def test_tells_the_way_of_a_request(self, system: System) -> None:
        headers = {"x-request-id": "mine"}
        await system.client.post(CHAT, json=system.chat(max_tokens=2), headers=headers)
        code, shown, _ = await run("explain", "mine", "--url", url_of(system))
        assert code == 0
        words = [line.split()[2:] for line in shown.splitlines()[1:]]
        assert [line[:2] for line in words] == [
            ["arrived"],
            ["sent", "to"],
            ["first", "token"],
            ["completed,", "200"],
        ]
        assert "predicted" in shown
        long = "x" * 100  # is not cut: it may be asked for
        headers = {"x-request-id": long}
        await system.client.post(CHAT, json=system.chat(max_tokens=2), headers=headers)
        listed = (await run("explain", "--url", url_of(system)))[1].splitlines()[1:]
        assert [line.split()[0] for line in listed] == [long, "mine"]
        as_json = (await run("explain", "mine", "--json", "--url", url_of(system)))[1]
        assert json.loads(as_json)["outcome"] == "completed"

    async def test_of_an_unknown_request_says_so(self, system: System) -> None:
        code, _, said = await run("explain", "no", "--url", url_of(system))
        assert (code, len(said.splitlines())) == (1, 1)
        assert "knows no request 'no'" in said


class TestDrain:
    async def test_drains_waits_and_takes_back(self, system: System) -> None:
        for engine in system.engines:
            engine.gate.clear()
        asking = [
            asyncio.create_task(system.client.post(CHAT, json=system.chat(max_tokens=2)))
            for _ in range(4)
        ]
        await system.until(lambda: system.num_engine_streams == 4)
        url = ("--url", url_of(system))
        assert (await run("drain", "r0", *url))[:2] == (0, "r0 gets no new work\n")
        waiting = asyncio.create_task(run("drain", "r0", "--wait", *url))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert "drained" in (await run("status", *url))[1]
        for engine in system.engines:
            engine.gate.set()
        code, shown, _ = await waiting
        assert (code, shown.splitlines()[-1]) == (0, "r0 has nothing left to do")
        assert [reply.status_code for reply in await asyncio.gather(*asking)] == [200] * 4
        assert (await run("undrain", "r0", *url))[:2] == (0, "r0 gets work again\n")
        assert not system.gateway.state().replicas["r0"].is_draining

    async def test_takes_a_server_by_its_address(self, system: System) -> None:
        await system.rename_engine("127.0.0.1:8101")
        code, shown, _ = await run("drain", "127.0.0.1:8101", "--url", url_of(system))
        assert (code, shown) == (0, "127.0.0.1:8101 gets no new work\n")
        assert system.gateway.state().replicas["127.0.0.1:8101"].is_draining

    async def test_says_which_engines_there_are(self, system: System) -> None:
        code, _, said = await run("drain", "r7", "--url", url_of(system))
        assert (code, len(said.splitlines())) == (1, 1)
        assert "There is no engine 'r7'; known: r0, r1" in said


class TestSeveralGateways:
    async def test_are_shown_and_told_together(self) -> None:
        async with running_together() as systems:
            headers = {"x-request-id": "mine"}
            await systems[1].client.post(CHAT, json=systems[1].chat(max_tokens=2), headers=headers)
            url = ("--url", url_of(systems[0]))
            shown = (await run("status", *url))[1]
            assert "2 of 2 answer, ranks 0, 1, core " in shown
            assert "1 completed" in shown
            shown = (await run("explain", "mine", *url))[1]
            assert shown.splitlines()[0].endswith(", gateway 1")
            assert (await run("drain", "r0", *url))[:2] == (
                0,
                "r0 gets no new work from 2 of 2 gateways\n",
            )
            systems[1].gateway.together.peers.close()
            await systems[0].until(lambda: not systems[0].gateway.together.peers._links)
            shown = (await run("status", *url))[1]
            assert "1 of 2 answer, ranks 0, core " in shown
            assert "gateway g1  there is no connection to it" in shown
            code, shown, said = await run("undrain", "r0", *url)
            assert (code, shown) == (1, "r0 gets work again from 1 of 2 gateways\n")
            assert said == "gateway g1: there is no connection to it\n"


class TestBench:
    @pytest.mark.parametrize("how", [("--concurrency", "3"), ("--rate", "200")])
    async def test_counts_what_came(self, system: System, how: tuple[str, str]) -> None:
        options = ("-n", "12", "--output-tokens", "5", "--json", *how)
        code, shown, _ = await run("bench", url_of(system), *options)
        assert code == 0
        made = json.loads(shown)
        assert made["load"]["model"] == "fake-model"
        result = made["result"]
        assert (result["num_completed"], result["num_failed"]) == (12, 0)
        assert 0 < result["ttft_s"][0] <= result["ttft_s"][2] <= result["e2e_s"][2]
        assert sum(len(engine.bodies) for engine in system.engines) == 12
        assert {body["max_tokens"] for body in system.engines[0].bodies} == {5}

    async def test_fails_if_a_request_does(self, system: System) -> None:
        code, shown, _ = await run("bench", url_of(system), "-n", "3", "--model", "no-such")
        assert code == 1
        assert "0 completed" in shown
        assert "3 failed: HTTP 404" in shown


class TestTop:
    async def test_shows_engines_live(self, system: System) -> None:
        app = Top(RunningService(url_of(system), None), every_s=0.1)
        async with app.run_test(size=(150, 30)) as pilot:
            table = app.query_one("#engines", DataTable)
            await system.until(lambda: table.row_count == 2)
            await system.add_engine()
            await system.until(lambda: table.row_count == 3)
            assert [table.get_row_at(i)[:2] for i in range(3)] == [
                ["r0", "ready"],
                ["r1", "ready"],
                ["r2", "ready"],
            ]
            assert "policy   headway" in str(app.query_one("#summary", Static).render())
            await pilot.press("space")
            await system.add_engine()
            await asyncio.sleep(0.3)
            assert table.row_count == 3  # paused
            await pilot.press("space")
            await system.until(lambda: table.row_count == 4)
            await pilot.press("q")
        assert app.return_code == 0

    async def test_says_when_nobody_answers(self) -> None:
        app = Top(RunningService(NOBODY, None), every_s=0.1)
        async with app.run_test():
            problem = app.query_one("#problem", Static)
            async with asyncio.timeout(5):
                while not problem.display:
                    await asyncio.sleep(0.01)
            assert "does not answer" in str(problem.render())

    async def test_needs_somebody_at_first(self) -> None:
        code, _, said = await run("top", "--url", NOBODY)
        assert (code, len(said.splitlines())) == (1, 1)


async def test_rates_are_of_two_looks(system: System) -> None:
    state = system.gateway.state()
    rates = TokenRates()
    assert rates.update(state, 0.0) == {}
    name, replica = next(iter(state.replicas.items()))
    snapshot = msgspec.structs.replace(replica.snapshot, num_output_tokens_total=50)
    later = msgspec.structs.replace(replica, snapshot=snapshot)
    state = msgspec.structs.replace(state, replicas={**state.replicas, name: later})
    found = rates.update(state, 2.0)
    assert found[name] == 25.0
    cells = {row.name: row.cells for row in engine_rows(state, found)}
    assert "25" in cells[name]


async def test_an_engine_says_what_it_emulates_and_why_it_takes_nothing(system: System) -> None:
    info = msgspec.structs.replace(INFO, engine="emulated (x)", device="H100")
    await system.add_engine(info=info)
    rows = {row.name: row for row in engine_rows(system.gateway.state(), {})}
    assert rows["r2"].cells[-1] == "emulated H100"
    draining = {
        name: msgspec.structs.replace(replica, is_draining=True)
        for name, replica in system.gateway.state().replicas.items()
    }
    state = msgspec.structs.replace(system.gateway.state(), replicas=draining)
    assert {row.condition for row in engine_rows(state, {})} == {"draining"}
