"""How many engines would it take? `headway whatif`."""

from typing import Annotated

import typer
from rich.console import Console

from serving.cli.errors import errors_in_one_line


def whatif(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="The traffic: a trace (Azure, Mooncake, ServeGen, ShareGPT, any CSV with a time "
            "and two token counts), or made up: poisson, bursty, ramp, spike, conversations.",
        ),
    ],
    slo_ttft: Annotated[float, typer.Option(min=0, help="Target of the time to first token, s.")],
    slo_tpot: Annotated[float, typer.Option(min=0, help="Target of the time per token, s.")] = 0.05,
    percentile: Annotated[
        int, typer.Option(metavar="50|90|99", help="Of both times, to be within the targets.")
    ] = 99,
    profile: Annotated[
        str, typer.Option(help="Of one engine: a name, or a file from `headway profile`.")
    ] = "h100",
    engines: Annotated[
        int | None, typer.Option(min=1, help="A number to look at in any case: what you have.")
    ] = None,
    max_engines: Annotated[int, typer.Option(min=1, help="Look no further.")] = 1024,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; headway:hold is headway without holding. Default: all."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests/s; unset: as the trace has them.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=100, help="Of the trace, from its beginning.")
    ] = 10_000,
    gateways: Annotated[int, typer.Option(min=1, help="Gateways in front of them.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    """Find how many engines traffic needs for latency targets, under each policy. Simulated."""
    with errors_in_one_line():
        from serving.capacity.whatif import ask  # late, as NumPy is: no other command needs it

        ask(
            Console(highlight=False),
            trace=trace,
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            percentile=percentile,
            profile=profile,
            num_engines=engines,
            max_engines=max_engines,
            variants=tuple(policy or ()),
            rate=rate,
            num_requests=requests,
            num_gateways=gateways,
            seed=seed,
        )
