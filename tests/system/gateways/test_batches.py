"""Both gateways of a service are killed in the middle of a batch: Serve's new ones end it."""

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.capacity.service import Service
from tests.serving.gateway.http.endpoints.batch.jobs import begin, content, ended, line

pytestmark = pytest.mark.timeout(300)

NUM_LINES = 200


class TwoGateways(Service):
    """Two gateways that share a port and a folder, and two emulated engines."""

    def __init__(self, folder: Path) -> None:
        batch = {"dir": str(folder), "max_inflight": 10}
        super().__init__(
            2, {"engine": "emulated", "served_model_name": "fake-model", "batch": batch}
        )

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["gateway"]["replicas"] = 2
        return config

    def gateways(self) -> list[int]:
        self.launches[0].refresh()
        return [
            process.pid
            for process in self.launches[0].living()
            if any("ServeReplica:headway:Gateway" in part for part in process.cmdline())
        ]


def owner_pid(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "batches.sqlite")) as database:
        [(owner,)] = database.execute("SELECT owner FROM batches").fetchall()
    return int(owner.split()[-2])


async def test_serve_starts_gateways_that_end_the_batch(tmp_path):
    async with TwoGateways(tmp_path) as service:
        client = openai.AsyncOpenAI(
            base_url=f"{service.urls[0]}/v1", api_key="none", max_retries=10
        )
        lines = [line(number, max_tokens=20) for number in range(NUM_LINES)]
        batch = await begin(client, lines)
        async with asyncio.timeout(60):
            while batch.request_counts.completed < 50:
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
        gateways = await asyncio.to_thread(service.gateways)
        assert len(gateways) == 2
        assert owner_pid(tmp_path) in gateways  # one of them runs it
        for pid in gateways:
            os.kill(pid, signal.SIGKILL)
        batch = await ended(client, batch, timeout_s=120)
        assert batch.status == "completed"
        assert batch.request_counts.completed == NUM_LINES
        answers = await content(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [f"line-{n}" for n in range(NUM_LINES)]
    assert not service.killed
