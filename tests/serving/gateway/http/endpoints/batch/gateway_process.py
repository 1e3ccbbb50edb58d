"""A gateway in a process of its own, before engines of the test's, which can be killed."""

import asyncio
import json
import sys

import uvloop

from serving.config import parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener


async def _serve(settings: dict, members: dict) -> None:
    config = parse(settings)
    gateway = Gateway(config, "gateway")
    gateway.driver.engines.set_members(members)
    await Listener(gateway.app, config.gateway).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(*map(json.loads, sys.argv[1:])))
