"""How do other routers reach an emulated engine? It is a server of its own, like `vllm serve`.

    python -m benchmarks.peers.emulated_server --profile h100-llama8b --port 8001

It serves what `vllm serve` does: `/v1/chat/completions`, `/v1/completions`,
`/v1/models`, `/health`, `/metrics` under vLLM's names, and KV events over ZMQ
with `--kv-events-config`, as there:

    --kv-events-config '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'
"""

import asyncio
import socket
from typing import Annotated

import msgspec
import typer
import uvicorn
import zmq

from router.fleet.step_budget import ITL_TARGET_S
from serving.capacity.profiles import ProfileError
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.engine.emulated.kv_events import KvEventPublisher, KvEvents, KvEventsConfig


def serve(
    port: Annotated[int, typer.Option(help="Port to listen on.")],
    profile: Annotated[
        str, typer.Option(help="A profile's file, or its name in serving/capacity/profiles.")
    ] = "h100-llama8b",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        str | None, typer.Option(help="The name clients ask for; else the profile's model.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply whose request sets no limit.")] = (
        200
    ),
    itl_target_s: Annotated[
        float,
        typer.Option(help="Steps prefill what fits into it, as Headway's; 0: as vLLM's."),
    ] = ITL_TARGET_S,
    scheduling_policy: Annotated[
        str, typer.Option(metavar="fcfs|priority", help="Order of the waiting queue, as vLLM's.")
    ] = "fcfs",
    seed: Annotated[int, typer.Option(help="Of the noise on step times.")] = 0,
    kv_events_config: Annotated[
        str, typer.Option(metavar="JSON", help="vLLM's option of this name; default: no events.")
    ] = "{}",
) -> None:
    """Serve one emulated engine until a signal ends it."""
    if scheduling_policy not in ("fcfs", "priority"):
        raise typer.BadParameter("fcfs or priority", param_hint="--scheduling-policy")
    try:
        events = msgspec.json.decode(kv_events_config, type=KvEventsConfig)
    except msgspec.DecodeError as error:
        raise typer.BadParameter(str(error), param_hint="--kv-events-config") from None
    args = EmulatedArgs(
        profile=profile,
        tokens=tokens,
        seed=seed,
        priority=scheduling_policy == "priority",
        itl_target_s=itl_target_s or None,
    )
    try:
        engine = EmulatedEngine(args, model, rank=port)
    except ProfileError as error:
        raise typer.BadParameter(str(error), param_hint="--profile") from None
    # The protocol is given because asyncio sets TCP_NODELAY only then.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise typer.BadParameter(f"{port}: {error.strerror}", param_hint="--port") from None
    try:
        asyncio.run(_serve(engine, listener, events))
    except zmq.ZMQError as error:
        raise typer.BadParameter(str(error), param_hint="--kv-events-config") from None


async def _serve(engine: EmulatedEngine, listener: socket.socket, events: KvEventsConfig) -> None:
    config = uvicorn.Config(
        engine.app,
        http="httptools",
        loop="asyncio",  # uvloop's timers count whole milliseconds, and a step takes only some
        interface="asgi3",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )
    server = uvicorn.Server(config)
    if not events.is_on:
        await server.serve(sockets=[listener])
        return
    engine.kv_events = KvEvents(engine.blocks, engine.info.block_size)
    publisher = KvEventPublisher(engine.kv_events, events)
    engine.subscribe(publisher.on_step)
    try:
        await server.serve(sockets=[listener])
    finally:
        publisher.close()


if __name__ == "__main__":
    typer.run(serve)
