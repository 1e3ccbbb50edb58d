"""How does a gateway's state look in a table, in the terminal or above it?"""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from router import EngineSnapshot
from router.fleet.replica import ReplicaState
from router.resilience.breaker import BreakerState
from serving.gateway.observe.state import GatewayState, ServiceState

ENGINE_COLUMNS = (
    *("engine", "state", "running", "waiting", "KV use", "to prefill", "TTFT", "tokens/s", "on"),
)


_PIPE_WIDTH = 200  # columns, where there is no terminal to say


def make_console() -> Console:
    """Return a console on which tables are cut for no pipe."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine, as people see it."""

    name: str
    condition: str  # "ready", or why it takes nothing
    cells: tuple[str, ...]  # by ENGINE_COLUMNS

    @property
    def is_ready(self) -> bool:
        return self.condition == "ready"


def engine_rows(state: GatewayState, rates: Mapping[str, float]) -> list[EngineRow]:
    """Return a row for each engine; `rates` are their output tokens/s, as far as known."""
    return [
        _engine_row(name, replica, rates.get(name), is_drained=name in state.drained)
        for name, replica in sorted(state.replicas.items())
    ]


def _engine_row(
    name: str, replica: ReplicaState, rate: float | None, *, is_drained: bool
) -> EngineRow:
    snapshot = replica.snapshot or EngineSnapshot(seq=0)
    told = replica.snapshot is not None
    condition = condition_of(replica, is_drained=is_drained)
    cells = (
        name,
        condition,
        f"{snapshot.num_running_reqs:,}" if told else "",
        f"{snapshot.num_waiting_reqs:,}" if told else "",
        f"{snapshot.kv_cache_usage:.0%}" if told else "",
        f"{replica.num_pending_prefill_tokens:,}",
        f"{replica.ttft_s * 1000:,.0f} ms",
        "" if rate is None else f"{rate:,.0f}",
        ("emulated " if replica.info.engine.startswith("emulated") else "") + replica.info.device,
    )
    return EngineRow(name, condition, cells)


def condition_of(replica: ReplicaState, *, is_drained: bool) -> str:
    """Return "ready", or why an engine takes nothing new; `is_drained`: an admin wants that."""
    if replica.is_draining:
        return "drained" if is_drained else "draining"
    if replica.breaker.state is BreakerState.OPEN:
        return "failing"
    if replica.is_mute:
        return "silent"
    if replica.is_quarantined:
        return "tries a suspect"
    if replica.breaker.state is BreakerState.HALF_OPEN:
        return "is tried"
    return "ready"


def summary(state: ServiceState) -> list[tuple[str, str]]:
    """Return what is true of a service as a whole: names and values."""
    held = state.held
    lines = [
        *_gateway_lines(state),
        ("policy", state.policy + (f" without {', '.join(state.ablate)}" if state.ablate else "")),
        ("open", f"{state.num_open_requests:,} requests on {state.num_connections:,} connections"),
        ("held", f"{held.num_requests:,} requests, {held.num_tokens:,} tokens"),
        (
            "ended",
            ", ".join(f"{number:,} {name}" for name, number in state.outcomes.items() if number),
        ),
    ]
    for name, each in held.by_class.items():
        late = f", {each.num_late:,} past their promised first token" if each.num_late else ""
        lines.append(
            (f"held, {name}", f"{each.num_requests:,}, the oldest for {each.oldest_s:.1f} s{late}")
        )
    for name, scaler in state.scalers.items():
        wanted = scaler.wanted
        words = (
            f"{scaler.num_running} there, {wanted.num_wanted} wanted: load "
            f"{wanted.recent_load:.2f}, {wanted.expected_load:.2f} in {wanted.start_s:.0f} s"
        )
        lines.append((f"engines of {name}" if name else "engines", words))
    if overloaded := [model for model, is_so in state.is_overloaded.items() if is_so]:
        lines.append(("overloaded", ", ".join(overloaded)))
    for name, provider in state.fallback.providers.items():
        usual = f"first token after {provider.ttft_s:.2f} s" if provider.ttft_s else "not used yet"
        lines.append((f"provider {name}", f"{usual}, spent {provider.cost:,.2f}"))
    return [(name, value or "none") for name, value in lines]


def _gateway_lines(state: ServiceState) -> list[tuple[str, str]]:
    """Return who has answered, and who has not."""
    if not state.gateways:
        return [("gateway", f"{state.gateway_id}, rank {state.rank}, core {state.core}")]
    ranks = ", ".join(str(rank) for rank in sorted(each.rank for each in state.gateways.values()))
    answered = f"{len(state.gateways)} of {state.num_gateways} answer, ranks {ranks}"
    missing = [(f"gateway {name}", reason) for name, reason in sorted(state.missing.items())]
    return [("gateways", f"{answered}, core {state.core}"), *missing]


class TokenRates:
    """Output tokens/s of engines between two states."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, float]] = {}

    def update(self, state: GatewayState, now_s: float) -> dict[str, float]:
        """Return the rates since the last call; none of engines that are new or began anew."""
        rates = {}
        totals = {
            name: (replica.snapshot.num_output_tokens_total, now_s)
            for name, replica in state.replicas.items()
            if replica.snapshot is not None
        }
        for name, (total, _) in totals.items():
            before, then_s = self._before.get(name, (total + 1, now_s))
            if total >= before and now_s > then_s:
                rates[name] = (total - before) / (now_s - then_s)
        self._before = totals
        return rates
