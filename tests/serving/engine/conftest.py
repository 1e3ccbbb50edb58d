"""A real vLLM engine of the tiny model behind a gateway, each on a loop of its own as deployed."""

import asyncio
import os
from collections.abc import Callable, Iterator

import httpx
import pytest

from serving.cluster.loop_thread import LoopThread
from serving.config import parse
from serving.engine.vllm.engine import VllmEngine
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from serving.planning.hardware import detect_hardware
from serving.planning.plan import make_plan
from serving.stream.client import StreamClient
from serving.stream.frames import Data, End, Head, Headers, Submit
from serving.stream.server import StreamServer
from tests.support.running_gateway import free_port
from tests.support.tiny_model import tiny_model

ARGS = {
    "dtype": "float32",  # so that a prefill in one part or in several agrees on the next token
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 32 * 2**20,
    "block_size": 32,
    "enforce_eager": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}


class Call:
    """One request over a stream of its own."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.status = 0
        self.headers: Headers = []
        self.body = b""
        self.ended = asyncio.Event()

    def on_head(self, client: StreamClient, frame: Head) -> None:
        self.status, self.headers = frame.status, frame.headers

    def on_data(self, client: StreamClient, frame: Data) -> None:
        self.body += frame.body

    def on_end(self, client: StreamClient, frame: End) -> None:
        assert frame.error is None
        self.ended.set()

    def on_lost(self, client: StreamClient) -> None:
        self.ended.set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None  # nothing else concerns it


class Served:
    """The engine, its stream server, and the gateway that knows it."""

    def __init__(self, model: str) -> None:
        port = free_port()
        self.pid = os.getpid()  # of the replica, if it were one
        self.config = parse(
            {
                "model": model,
                "served_model_name": "tiny",
                "device": "cpu",
                "replicas": 1,
                "gateway": {"port": port},
                "engine": {"args": ARGS},
            }
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._engine_loop = LoopThread("engine")
        self._gateway_loop = LoopThread("gateway")
        self.engine, self.server, address = self._run(self._engine_loop, self._start_engine())
        self.gateway, self._listener = self._run(self._gateway_loop, self._start_gateway(address))

    def _run(self, loop: LoopThread, coroutine):
        return asyncio.run(loop.run(coroutine))

    async def _start_engine(self):
        plan = make_plan(self.config, detect_hardware())
        engine = await VllmEngine.start(self.config, plan, local_rank=0)
        server = StreamServer(engine, self.config.gateway.stream_window_bytes)
        return engine, server, await server.listen("127.0.0.1")

    async def _start_gateway(self, address):
        gateway = Gateway(self.config, "gateway")
        listener = Listener(gateway.app, self.config.gateway)
        await listener.start()
        host, port = address
        self.member = {"host": host, "port": port, "secret": self.server.secret}
        gateway.driver.engines.set_members({"r0": self.member})
        while not gateway.driver.engines.infos:
            await asyncio.sleep(0.01)
        return gateway, listener

    def close(self) -> None:
        async def close_gateway():
            self.gateway.close()
            await self._listener.stop()

        async def close_engine():
            self.server.close()
            await self.engine.shutdown()

        self.http.close()
        self._run(self._gateway_loop, close_gateway())
        self._run(self._engine_loop, close_engine())

    def ask(self, body: dict, path: str = "/v1/completions") -> httpx.Response:
        """Send a request for a few tokens of the tiny model."""
        return self.http.post(path, json={"model": "tiny", "max_tokens": 8, **body})

    def ask_engine(self, content: bytes, path: str = "/v1/completions") -> httpx.Response:
        """Send a body past the gateway, which reads it first and may try twice."""
        headers = [(b"content-type", b"application/json")]
        call = Call(Submit(1, "a-request", 1, 0, 0, "POST", path, headers, content))

        async def ask():
            client = await StreamClient.connect("r0", self.member, call)
            client.post(call.submit)
            await call.ended.wait()
            client.close()

        self._run(self._gateway_loop, ask())
        return httpx.Response(call.status, headers=call.headers, content=call.body)

    def assert_nothing_is_left(self) -> None:
        """What was answered has left the engine, and the engine serves on."""
        assert self.ask({"prompt": "Once upon a time"}).status_code == 200
        assert not self.engine.dead
        assert not self.engine._llm.output_processor.request_states
        assert not self.server.accountings


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    served = Served(str(tiny_model(tmp_path_factory.mktemp("tiny"))))
    yield served
    served.close()
