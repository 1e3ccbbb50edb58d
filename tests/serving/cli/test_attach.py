"""`headway attach` as a process, before servers that are fakes."""

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import yaml
from typer.testing import CliRunner

from serving.cli.main import main
from tests.serving.external.fake_vllm import FakeVllm, listening, prompt_ids, words
from tests.support.running_gateway import free_port

HEADWAY = str(Path(sys.executable).parent / "headway")
MESSAGES = [{"role": "user", "content": "hello"}]
BODY = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 20}


class Attached:
    """The process, its output so far and its address."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.text = ""
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        while line := await self.process.stdout.readline():
            self.text += line.decode()

    async def until(self, words: str, timeout_s: float = 15.0) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while words not in self.text:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(self.text) from None

    async def ended(self) -> int:
        async with asyncio.timeout(15):
            code = await self.process.wait()
            await self._reading
        return code


@contextlib.asynccontextmanager
async def attach(*args: str):
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(HEADWAY, "attach", *args, "--port", str(port)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Attached(process, port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def said(text: str) -> str:
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


async def test_it_serves_and_ctrl_c_drains():
    one, two = FakeVllm(token_s=0.05), FakeVllm(token_s=0.05)
    async with listening(one), listening(two), attached_to(one, two) as attached:
        await attached.until("2 of 2 servers ready (tiny: ")
        async with httpx.AsyncClient(base_url=attached.url, timeout=20) as client:
            task = asyncio.ensure_future(client.post("/v1/chat/completions", json=BODY))
            while not one.num_steps + two.num_steps:
                await asyncio.sleep(0.01)
            attached.process.send_signal(signal.SIGINT)
            await attached.until("draining")
            assert said((await task).text) == words(prompt_ids(MESSAGES), 20)
        assert await attached.ended() == 0


def attached_to(*servers: FakeVllm):
    return attach(*(server.url for server in servers))


async def test_a_second_signal_ends_it_at_once():
    server = FakeVllm(token_s=0.05)
    async with listening(server), attached_to(server) as attached:
        await attached.until("1 of 1 servers ready")
        async with httpx.AsyncClient(base_url=attached.url, timeout=20) as client:
            body = {**BODY, "max_tokens": 4000}
            task = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            while not server.num_steps:
                await asyncio.sleep(0.01)
            attached.process.send_signal(signal.SIGTERM)
            await attached.until("draining")
            await asyncio.sleep(0.6)
            attached.process.send_signal(signal.SIGTERM)
            reply = await task
            assert '"error"' in reply.text
            assert "[DONE]" not in reply.text
        assert await attached.ended() == 0


async def test_servers_of_a_file_that_come_and_go(tmp_path):
    one, two, port = FakeVllm(key="k"), FakeVllm(key="k"), free_port()
    (tmp_path / "keys.yaml").write_text(
        yaml.safe_dump(
            {
                "applications": [
                    {
                        "import_path": "serving.cluster.application:build",
                        "args": {"external": [{"url": f"http://127.0.0.1:{port}", "key": "k"}]},
                    }
                ]
            }
        )
    )
    async with listening(two), attach(str(tmp_path / "keys.yaml")) as attached:
        await attached.until("cannot be used, and is tried again: no connection")
        async with listening(one, port):
            await attached.until("1 of 1 servers ready")
            async with httpx.AsyncClient(base_url=attached.url, timeout=20) as client:
                reply = await client.post("/v1/chat/completions", json=BODY)
                assert said(reply.text) == words(prompt_ids(MESSAGES), 20)
        await attached.until("0 of 1 servers ready")
        file = tmp_path / "keys.yaml"
        content = yaml.safe_load(file.read_text())
        args = content["applications"][0]["args"]
        args["external"] = [{"url": two.url, "key": "k"}]
        file.write_text(yaml.safe_dump(content))
        await attached.until(f"tiny: {two.url.removeprefix('http://')}")
        assert '"k"' not in attached.text


def test_what_cannot_be_is_said_in_one_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "applications": [
                    {
                        "import_path": "serving.cluster.application:build",
                        "args": {"model": "m", "external": [{"url": "http://a"}]},
                    }
                ]
            }
        )
    )
    for args, words_ in (
        ((), "no servers"),
        (("a:8000",), "external.0.url"),
        (("http://a", "http://a/v1"), "once"),
        (("http://a", "--set", "gateway.replicas=2"), "one gateway, without Ray"),
        ((str(config),), "starts no engines"),
        (("http://a", "--host", "0.0.0.0"), "open to the network"),
        (("http://a", "--key-env", "NOT_THERE_AT_ALL"), "key_env NOT_THERE_AT_ALL"),
    ):
        ended = CliRunner().invoke(main, ["attach", *args, "--port", str(free_port())])
        logging.getLogger("serving").handlers.clear()  # its stderr is closed by now
        assert ended.exit_code == 2, ended.output
        assert words_ in ended.stderr, ended.output
        assert ended.stderr.count("\n") == 1, ended.output


def test_no_ray_and_no_vllm_is_needed():
    code = (
        "import sys, serving.cli.main, serving.cli.commands.attach, serving.gateway.app\n"
        "print(sorted({'ray', 'vllm', 'torch'} & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "[]\n", ended.stderr
