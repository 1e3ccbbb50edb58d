"""What did kills and hangs of real engines do? The report on a run of `benchmarks.chaos.real`."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.chaos.checks import check_probes, splice_gaps_s
from benchmarks.chaos.client import Reply
from benchmarks.chaos.faults import InjectedFault, ProcessFault
from benchmarks.chaos.verdicts import Verdict, VerdictKind
from benchmarks.report.report import Report, percentile
from router.resilience.breaker import BreakerEvent, BreakerState
from serving.gateway.observe.state import GatewayState

# A stream stops at the fault, but its last chunk may still be on its way.
_GAP_BEGINS_WITHIN_S = 2.0
_DETECTION_TARGET_S = 5.0


@dataclass
class Observations:
    """Everything that one run showed."""

    tie_nats: float  # two choices of a token that are no further apart are a tie
    num_references: int = 0
    num_undisturbed_different: int = 0
    replies: list[Reply] = field(default_factory=list)
    verdicts: list[tuple[Reply, Verdict]] = field(default_factory=list)
    faults: list[InjectedFault] = field(default_factory=list)
    breaker_events: dict[BreakerEvent, None] = field(default_factory=dict)  # as they came
    resumptions: tuple[int, float] = (0, 0.0)  # number of replies, mean seconds
    before: GatewayState | None = None
    after: GatewayState | None = None


def fill_report(report: Report, observed: Observations) -> None:
    """Add all figures and targets to the report."""
    for fault in ProcessFault:
        own = [each for each in observed.faults if each.fault is fault]
        if own:
            recoveries_s = [(each.recovered_s or 0.0) - each.at_s for each in own]
            report.add_row(
                "faults",
                fault=fault.value,
                times=len(own),
                of_these_the_last_engine=sum(each.is_last for each in own),
                streams_hit=sum(each.num_streams for each in own),
                until_both_work_again_mean_s=sum(recoveries_s) / len(own),
                longest_s=max(recoveries_s),
            )
    _fill_replies(report, observed)
    _fill_splices(report, observed)
    _fill_state(report, observed)


def _fill_replies(report: Report, observed: Observations) -> None:
    wrong = [fault for reply in observed.replies if (fault := reply.fault())]
    kinds = Counter(verdict.kind for _, verdict in observed.verdicts)
    streamed = sum(reply.question.is_streamed for reply in observed.replies)
    report.add_row(
        "replies",
        sent=len(observed.replies),
        streamed=streamed,
        failed=len(wrong),
        **{kind.name.lower(): kinds[kind] for kind in VerdictKind},
    )
    for reply, verdict in observed.verdicts:
        if verdict.kind is not VerdictKind.EQUAL:
            report.add_row(
                "replies unlike the undisturbed ones",
                question=reply.question.text[-50:],
                judged=verdict.kind.name.lower(),
                first_difference=verdict.first_difference,
                of_tokens=len(reply.token_ids),
                gap_there_nats=verdict.gap,
                further_ties=verdict.num_ties,
            )
    report.add_target("streamed requests", streamed, ">= 200")
    report.add_target("failed requests", len(wrong), "== 0")
    report.add_target("replies that differ, unexplained", kinds[VerdictKind.UNEXPLAINED], "== 0")
    report.add_note(
        f"A near tie: up to the first difference the tokens are those of the undisturbed reply; "
        f"there vLLM gives both at most {observed.tie_nats} nats less than its first choice; "
        f"and from the reply's own tokens vLLM continues as the reply does. Of "
        f"{observed.num_references} undisturbed replies {observed.num_undisturbed_different} "
        f"differed when they were asked for again."
    )
    for fault, count in Counter(wrong).items():
        report.add_note(f"Wrong {count} times: {fault}")


def _fill_splices(report: Report, observed: Observations) -> None:
    last_s = [fault.at_s for fault in observed.faults if fault.is_last]
    without = [reply for reply in observed.replies if _waited_through(reply, last_s)]
    groups = {
        "a kill, another engine at work": (
            [each for each in observed.replies if each not in without],
            [each.at_s for each in observed.faults if each.fault.is_kill and not each.is_last],
        ),
        "a hang, another engine at work": (
            [each for each in observed.replies if each not in without],
            [each.at_s for each in observed.faults if not each.fault.is_kill],
        ),
        "a kill of the last engine": (without, [each.at_s for each in observed.faults]),
    }
    for name, (replies, times_s) in groups.items():
        extra_s = splice_gaps_s(replies, times_s, _GAP_BEGINS_WITHIN_S)
        if extra_s:
            report.add_row(
                "extra delay at the seam as the client sees it, s",
                after=name,
                replies=len(extra_s),
                p50=percentile(extra_s, 50),
                p99=percentile(extra_s, 99),
                max=extra_s[-1],
            )
    num_resumed, mean_s = observed.resumptions
    report.add_row(
        "begun replies that went on elsewhere, as the gateway counts them",
        resumptions=num_resumed,
        mean_delay_s=mean_s,
    )
    detections_s = _detections_s(observed)
    if detections_s:
        report.add_row(
            "from SIGSTOP to the engine being left, s",
            hangs=len(detections_s),
            mean=sum(detections_s) / len(detections_s),
            max=max(detections_s),
        )
        report.add_target(
            "slowest detection of a hang, s", max(detections_s), f"<= {_DETECTION_TARGET_S:g}"
        )


def _fill_state(report: Report, observed: Observations) -> None:
    before, after = observed.before, observed.after
    assert before is not None  # the run has ended
    assert after is not None
    events = sorted(observed.breaker_events, key=lambda event: event.at_s)
    num_half_open, wrong_probes = check_probes(events)
    outcomes = {
        name: count - before.outcomes.get(name, 0)
        for name, count in after.outcomes.items()
        if count - before.outcomes.get(name, 0)
    }
    kinds = Counter(event.event for event in events)
    report.add_row(
        "breakers and outcomes",
        opened=kinds["open"],
        half_open_with_a_probe=num_half_open,
        probes=kinds["probe"],
        closed_again=kinds["closed"],
        outcomes=str(outcomes),
        retries_and_resumptions=after.retries.num_made - before.retries.num_made,
    )
    num_left = after.num_open_requests + after.num_placed + after.num_record_bytes
    num_left += sum(replica.ledger.num_open for replica in after.replicas.values())
    kills = sum(fault.fault.is_kill for fault in observed.faults)
    report.add_target("kills", kills, ">= 10")
    report.add_target("hangs", len(observed.faults) - kills, ">= 3")
    report.add_target("breakers closed again by a probe", kinds["closed"], ">= 3")
    report.add_target("probes beyond one per half-open", len(wrong_probes), "== 0")
    report.add_target("breakers not closed at the end", _num_not_closed(after), "== 0")
    report.add_target("requests and bookings left over", num_left, "== 0")
    num_missing = len(observed.replies) - sum(outcomes.values())
    report.add_target("requests without exactly one outcome", abs(num_missing), "== 0")
    for sentence in wrong_probes:
        report.add_note(f"Probes: {sentence}")


def _num_not_closed(state: GatewayState) -> int:
    replicas = state.replicas.values()
    return sum(replica.breaker.state is not BreakerState.CLOSED for replica in replicas)


def _detections_s(observed: Observations) -> list[float]:
    """Return the seconds from each SIGSTOP until the engine was found to hang."""
    found = []
    for fault in observed.faults:
        if not fault.fault.is_kill:
            seen_s = [
                event.at_s
                for event in observed.breaker_events
                if event.breaker == fault.replica_id
                and event.event == "open"
                and event.at_s >= fault.at_s
            ]
            found.append(min(seen_s, default=float("inf")) - fault.at_s)
    return found


def _waited_through(reply: Reply, times_s: list[float]) -> bool:
    """Whether the reply paused from at most 0.5 s after one of these times to 1.5 s after it."""
    return any(
        before <= time_s + 0.5 and time_s + 1.5 <= after
        for before, after in itertools.pairwise(reply.times_s)
        for time_s in times_s
    )
