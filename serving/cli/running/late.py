"""`top`, `explain` and `bench` need much that takes long to import: only when they are called."""

from typing import Annotated

import typer
from rich.console import Console

from serving.cli.errors import errors_in_one_line
from serving.cli.running.service import DEFAULT_URL, ApiKey, RunningService, Url


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch engines, queue and rates of a running service."""
    with errors_in_one_line():
        from serving.cli.running.top import run

        run(url, api_key, every)


def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST_ID",
            help="The reply's x-request-id, or the id that the client gave. Without one: the last.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Annotated[
        bool, typer.Option("--json", help="As /headway/requests?id=ID has it.")
    ] = False,
) -> None:
    """Show which way a request took: held why, sent where, predicted how, answered when.

    A gateway knows its last thousand requests and the open ones. Of several gateways any may be
    asked: it asks the others.
    """
    with errors_in_one_line():
        from serving.cli.running.explain import run

        run(RunningService(url, api_key), request_id, as_json=json)


def bench(
    url: Annotated[
        str, typer.Argument(envvar="HEADWAY_URL", help="Of any OpenAI endpoint of vLLM's.")
    ] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="Which; unset: the first that it lists.")] = "",
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many.")] = 100,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests/s at random times; unset: --concurrency."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="At the same time, without --rate.")
    ] = 8,
    prompt_words: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 200,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, exactly.")] = 100,
    seed: Annotated[int, typer.Option(help="Of prompts and times.")] = 0,
    api_key: ApiKey = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Send a small load and show percentiles of time to first token and per token.

    A glance, not a benchmark: the client shares this machine. Exits with 1 if a request fails.
    """
    with errors_in_one_line():
        from serving.cli.running import bench

        load = bench.Load(model, requests, rate, concurrency, prompt_words, output_tokens, seed)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        service = RunningService(url, api_key)
        raise typer.Exit(bench.run(service, load, console, as_json=json))
