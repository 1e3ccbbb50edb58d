"""Generated losses: whatever engines do, the client gets the reply's bytes once, and one end.

The machine below is the shell and the engines of up to three replies that share a bound of
records. Each reply is a row of groups, each group some bytes (none, if what was generated is
not due yet); engines send these in frames of any size, and are lost between any two.
"""

import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.resilience.resume import Records, Reply, Resume, ResumeSplice, ResumeSpliceError

MAX_RECORD_BYTES = 12
SLOTS = st.integers(0, 2)


def text(name: str, groups: list[int]) -> bytes:
    """The bytes made of these groups, each of which says how many."""
    return b"".join(
        bytes((zlib.crc32(f"{name} {number} {n}".encode()) % 251,))
        for number, size in enumerate(groups)
        for n in range(size)
    )


@dataclass
class Engine:
    """One attempt: what it has generated, and how far it has sent."""

    splice: ResumeSplice | None
    groups: list[int]  # generated here or before
    num_told: int  # groups that the gateway has been told of
    unsent: bytes  # made of these, and still to come, what the client has first


@dataclass
class Case:
    """One reply, what its client has, and who has it."""

    name: str
    whole: list[int]  # groups
    can_resume: bool
    reply: Reply
    client: bytearray = field(default_factory=bytearray)
    kept: list[int] | None = field(default_factory=list)  # groups recorded, by our own count
    engine: Engine | None = None

    @property
    def known(self) -> list[int]:
        """What another engine can go on from."""
        return (self.kept or []) if self.can_resume else []


class Gateway(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.records = Records(MAX_RECORD_BYTES)
        self.cases: dict[int, Case] = {}
        self.num_opened = 0

    @rule(slot=SLOTS, groups=st.lists(st.integers(0, 3), min_size=1, max_size=8), ok=st.booleans())
    def open(self, slot, groups, ok):
        if slot in self.cases:
            return
        self.num_opened += 1
        reply = Reply(self.records, can_resume=ok)
        self.cases[slot] = Case(f"q{self.num_opened}", groups, ok, reply)

    @rule(slot=SLOTS)
    def dispatch(self, slot):
        """An engine gets it, and plays through what is recorded."""
        case = self.cases.get(slot)
        if case is None or case.engine is not None or not case.reply.can_go_on:
            return
        resume = case.reply.resume()
        known = case.known
        if not case.can_resume and case.kept is not None:
            case.kept = []  # it begins anew, and so does the count
        assert (resume is None) == (not case.client and not known)
        if resume is not None:
            assert list(resume.record) == known
            assert resume.num_bytes == len(case.client)
        case.engine = Engine(
            None if resume is None else ResumeSplice(resume),
            list(known),
            len(known),
            text(case.name, known),
        )

    @rule(slot=SLOTS, num_groups=st.integers(1, 3))
    def generate(self, slot, num_groups):
        case = self.cases.get(slot)
        if case is None or case.engine is None:
            return
        engine = case.engine
        before = text(case.name, engine.groups)
        engine.groups = case.whole[: len(engine.groups) + num_groups]
        engine.unsent += text(case.name, engine.groups)[len(before) :]

    @rule(slot=SLOTS, num_bytes=st.integers(0, 5))
    def send(self, slot, num_bytes):
        """One frame: so many bytes at most, and the groups that were not told yet."""
        case = self.cases.get(slot)
        if case is None or case.engine is None:
            return
        engine, reply = case.engine, case.reply
        body, engine.unsent = engine.unsent[:num_bytes], engine.unsent[num_bytes:]
        groups = engine.groups[engine.num_told :]
        engine.num_told = len(engine.groups)
        if engine.splice is not None:
            body = engine.splice.cut(body, is_last=False)
        kept_before = self.records.num_bytes
        was_first = reply.awaits_first_byte
        is_first = reply.receive(body, bytes(groups))
        assert is_first == (was_first and bool(body))
        case.client += body
        if groups and case.kept is not None:
            if kept_before + len(groups) > MAX_RECORD_BYTES:
                case.kept = None
            else:
                case.kept += groups

    @rule(slot=SLOTS)
    def lose(self, slot):
        """Its engine is gone; what was not sent is lost with it."""
        case = self.cases.get(slot)
        if case is None or case.engine is None:
            return
        case.engine = None
        may = case.can_resume and case.kept is not None
        assert case.reply.can_go_on == (may or not case.client)
        if not case.reply.can_go_on:
            self.over(slot)  # an error to the client

    @rule(slot=SLOTS)
    def finish(self, slot):
        """Everything is generated and sent; the end may be said twice."""
        case = self.cases.get(slot)
        if case is None or case.engine is None:
            return
        self.generate(slot, len(case.whole))
        while case.engine.unsent or case.engine.num_told < len(case.engine.groups):
            self.send(slot, 5)
        assert bytes(case.client) == text(case.name, case.whole)
        self.over(slot)

    @rule(slot=SLOTS)
    def leave(self, slot):
        """The client is gone, wherever the reply is."""
        if slot in self.cases:
            self.over(slot)

    def over(self, slot):
        reply = self.cases.pop(slot).reply
        reply.end()
        num_bytes = self.records.num_bytes
        reply.end()
        assert self.records.num_bytes == num_bytes
        assert reply.record == reply.generated == b""

    @invariant()
    def clients_have_the_beginning_of_their_reply(self):
        for case in self.cases.values():
            assert text(case.name, case.whole).startswith(bytes(case.client))
            assert case.reply.has_begun == bool(case.client)

    @invariant()
    def memory_is_what_open_replies_keep(self):
        kept = sum(len(case.kept or ()) for case in self.cases.values())
        assert self.records.num_bytes == kept <= MAX_RECORD_BYTES
        for case in self.cases.values():
            assert list(case.reply.generated) == (case.kept or [])
            assert list(case.reply.record) == case.known


TestGateway = Gateway.TestCase
TestGateway.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("num_known", range(7))
@pytest.mark.parametrize("cuts", range(32), ids="{:05b}".format)
def test_the_seam_is_exact_however_the_frames_are_cut(num_known, cuts):
    """Each byte once, those beside the seam, too: all ways to cut six bytes."""
    whole = b"abcdef"
    ends = [end for end in range(1, 6) if cuts >> (end - 1) & 1]
    starts = [0, *ends]
    splice = ResumeSplice(Resume(b"x", num_known, zlib.crc32(whole[:num_known])))
    got = [
        splice.cut(whole[start:end], is_last=end == 6)
        for start, end in zip(starts, [*ends, 6], strict=True)
    ]
    assert b"".join(got) == whole[num_known:]
    assert splice.cut(b"gh", is_last=True) == b"gh"


def test_another_reply_is_not_passed_on():
    reply = Reply(Records(100), can_resume=True)
    reply.resume()
    assert reply.receive(b"ab", b"\x02")
    splice = ResumeSplice(reply.resume())
    with pytest.raises(ResumeSpliceError, match="differs"):
        splice.cut(b"axe", is_last=False)
    with pytest.raises(ResumeSpliceError, match="shorter"):
        ResumeSplice(Resume(b"", 2, 0)).cut(b"a", is_last=True)


def test_what_an_engine_has_added_is_prefilled_by_the_next_one():
    records = Records(3)
    reply = Reply(records, can_resume=True)
    reply.resume()
    reply.receive(b"", b"\x01\x01")
    assert reply.count_new_tokens(2) == 2
    reply.resume()
    reply.receive(b"", b"\x01")
    assert reply.count_new_tokens(3) == 1
    reply.resume()
    reply.receive(b"", b"\x01")  # beyond the bound: given up, and nothing of it is kept
    assert reply.can_go_on
    assert reply.resume() is None
    assert reply.count_new_tokens(0) == -3
    assert records.num_bytes == 0
