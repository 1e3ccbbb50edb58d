"""What kills and hangs of real engines did: the report on a run of `benchmarks.chaos.real`."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.chaos.checks import probe_faults, seam_gaps_s
from benchmarks.chaos.client import Reply
from benchmarks.chaos.faults import Fault, Inflicted
from benchmarks.chaos.verdicts import Kind, Verdict
from benchmarks.report.report import Report, percentile
from router.resilience.breaker import BreakerEvent, BreakerState
from serving.gateway.metrics import GatewayState

# A stream stops with the fault; its last chunk may have been under way.
_SEAM_STARTS_WITHIN_S = 2.0
_DETECTION_TARGET_S = 5.0


@dataclass
class Observed:
    """What was seen of one run."""

    tie_nats: float  # how near two choices of a token are to be a tie
    num_references: int = 0
    num_undisturbed_different: int = 0
    replies: list[Reply] = field(default_factory=list)
    verdicts: list[tuple[Reply, Verdict]] = field(default_factory=list)
    faults: list[Inflicted] = field(default_factory=list)
    breaker_events: dict[BreakerEvent, None] = field(default_factory=dict)  # as they came
    resumed: tuple[int, float] = (0, 0.0)  # how many replies, mean seconds
    before: GatewayState | None = None
    after: GatewayState | None = None


def fill(report: Report, seen: Observed) -> None:
    """Judge what came back."""
    for fault in Fault:
        own = [each for each in seen.faults if each.fault is fault]
        if own:
            recoveries_s = [(each.recovered_s or 0.0) - each.at_s for each in own]
            report.row(
                "faults",
                fault=fault.value,
                times=len(own),
                of_these_the_last_engine=sum(each.is_last for each in own),
                streams_hit=sum(each.num_streams for each in own),
                until_both_work_again_mean_s=sum(recoveries_s) / len(own),
                longest_s=max(recoveries_s),
            )
    _fill_replies(report, seen)
    _fill_seams(report, seen)
    _fill_state(report, seen)


def _fill_replies(report: Report, seen: Observed) -> None:
    wrong = [fault for reply in seen.replies if (fault := reply.fault())]
    kinds = Counter(verdict.kind for _, verdict in seen.verdicts)
    streamed = sum(reply.question.is_streamed for reply in seen.replies)
    report.row(
        "replies",
        sent=len(seen.replies),
        streamed=streamed,
        failed=len(wrong),
        **{kind.name.lower(): kinds[kind] for kind in Kind},
    )
    for reply, verdict in seen.verdicts:
        if verdict.kind is not Kind.EQUAL:
            report.row(
                "replies unlike the undisturbed ones",
                question=reply.question.text[-50:],
                judged=verdict.kind.name.lower(),
                first_difference=verdict.first_difference,
                of_tokens=len(reply.token_ids),
                gap_there_nats=verdict.gap,
                further_ties=verdict.num_ties,
            )
    report.target("streamed requests", streamed, ">= 200")
    report.target("failed requests", len(wrong), "== 0")
    report.target("replies that differ, unexplained", kinds[Kind.UNEXPLAINED], "== 0")
    report.note(
        f"A near tie: up to the first difference the tokens are those of the undisturbed reply; "
        f"there vLLM gives both at most {seen.tie_nats} nats less than its first choice; "
        f"and from the reply's own tokens it goes on as the reply does. Of "
        f"{seen.num_references} undisturbed replies {seen.num_undisturbed_different} "
        f"differed when asked for once more."
    )
    for fault, count in Counter(wrong).items():
        report.note(f"Wrong {count} times: {fault}")


def _fill_seams(report: Report, seen: Observed) -> None:
    last_s = [fault.at_s for fault in seen.faults if fault.is_last]
    without = [reply for reply in seen.replies if _waited_through(reply, last_s)]
    groups = {
        "a kill, another engine at work": (
            [each for each in seen.replies if each not in without],
            [each.at_s for each in seen.faults if each.fault.is_kill and not each.is_last],
        ),
        "a hang, another engine at work": (
            [each for each in seen.replies if each not in without],
            [each.at_s for each in seen.faults if not each.fault.is_kill],
        ),
        "a kill of the last engine": (without, [each.at_s for each in seen.faults]),
    }
    for name, (replies, times_s) in groups.items():
        extra_s = seam_gaps_s(replies, times_s, _SEAM_STARTS_WITHIN_S)
        if extra_s:
            report.row(
                "extra delay at the seam as the client sees it, s",
                after=name,
                replies=len(extra_s),
                p50=percentile(extra_s, 50),
                p99=percentile(extra_s, 99),
                max=extra_s[-1],
            )
    num_resumed, mean_s = seen.resumed
    report.row(
        "begun replies that went on elsewhere, as the gateway counts them",
        resumptions=num_resumed,
        mean_delay_s=mean_s,
    )
    detections_s = _detections_s(seen)
    if detections_s:
        report.row(
            "from SIGSTOP to the engine being left, s",
            hangs=len(detections_s),
            mean=sum(detections_s) / len(detections_s),
            max=max(detections_s),
        )
        report.target(
            "slowest detection of a hang, s", max(detections_s), f"<= {_DETECTION_TARGET_S:g}"
        )


def _fill_state(report: Report, seen: Observed) -> None:
    before, after = seen.before, seen.after
    assert before is not None  # the run has come to its end
    assert after is not None
    events = sorted(seen.breaker_events, key=lambda event: event.at_s)
    num_half_open, wrong_probes = probe_faults(events)
    outcomes = {
        name: count - before.outcomes.get(name, 0)
        for name, count in after.outcomes.items()
        if count - before.outcomes.get(name, 0)
    }
    kinds = Counter(event.event for event in events)
    report.row(
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
    kills = sum(fault.fault.is_kill for fault in seen.faults)
    report.target("kills", kills, ">= 10")
    report.target("hangs", len(seen.faults) - kills, ">= 3")
    report.target("breakers closed again by a probe", kinds["closed"], ">= 3")
    report.target("probes beyond one per half-open", len(wrong_probes), "== 0")
    report.target("breakers not closed at the end", _num_not_closed(after), "== 0")
    report.target("requests and bookings left over", num_left, "== 0")
    num_missing = len(seen.replies) - sum(outcomes.values())
    report.target("requests without exactly one outcome", abs(num_missing), "== 0")
    for sentence in wrong_probes:
        report.note(f"Probes: {sentence}")


def _num_not_closed(state: GatewayState) -> int:
    replicas = state.replicas.values()
    return sum(replica.breaker.state is not BreakerState.CLOSED for replica in replicas)


def _detections_s(seen: Observed) -> list[float]:
    """From each SIGSTOP to the moment at which the engine was taken for hung."""
    found = []
    for fault in seen.faults:
        if not fault.fault.is_kill:
            seen_s = [
                event.at_s
                for event in seen.breaker_events
                if event.breaker == fault.replica_id
                and event.event == "open"
                and event.at_s >= fault.at_s
            ]
            found.append(min(seen_s, default=float("inf")) - fault.at_s)
    return found


def _waited_through(reply: Reply, times_s: list[float]) -> bool:
    """Whether the reply stood still for a second or more across one of these moments."""
    return any(
        before <= time_s + 0.5 and time_s + 1.5 <= after
        for before, after in itertools.pairwise(reply.times_s)
        for time_s in times_s
    )
