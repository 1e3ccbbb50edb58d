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
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.resilience.resume import Records, Reply, Resume, ResumeSplice, ResumeSpliceError

MAX_RECORD_BYTES = 12
MAX_OPEN = 3
PICKS = st.integers(0, MAX_OPEN - 1)


def text(reply: int, groups: list[int]) -> bytes:
    """The bytes made of these groups, each of which says how many."""
    return b"".join(
        bytes((zlib.crc32(f"{reply} {number} {n}".encode()) % 251,))
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
    has_sent: bool = False  # anything that the client lacked


@dataclass
class Case:
    """One reply, what its client has, and who has it."""

    number: int
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

    def case(self, pick: int) -> Case:
        """One of the open replies."""
        return list(self.cases.values())[pick % len(self.cases)]

    @precondition(lambda self: len(self.cases) < MAX_OPEN)
    @rule(groups=st.lists(st.integers(0, 3), min_size=2, max_size=8), ok=st.booleans())
    def open(self, groups, ok):
        self.num_opened += 1
        case = Case(self.num_opened, groups, ok, Reply(self.records, can_resume=ok))
        self.cases[case.number] = case
        self.dispatch(case)

    def dispatch(self, case):
        """An engine gets it, and plays through what is recorded."""
        resume = case.reply.resume()
        known = case.known
        if not case.can_resume and case.kept is not None:
            case.kept = []  # it begins anew, and so does the count
        assert (resume is None) == (not case.client and not known)
        if resume is not None:
            checksum = zlib.crc32(case.client)
            assert resume == Resume(bytes(known), len(case.client), checksum)
        case.engine = Engine(
            None if resume is None else ResumeSplice(resume),
            list(known),
            len(known),
            text(case.number, known),
        )

    @precondition(lambda self: self.cases)
    @rule(pick=PICKS, num_groups=st.integers(1, 3))
    def generate(self, pick, num_groups):
        case = self.case(pick)
        engine = case.engine
        before = text(case.number, engine.groups)
        engine.groups = case.whole[: len(engine.groups) + num_groups]
        engine.unsent += text(case.number, engine.groups)[len(before) :]

    @precondition(lambda self: self.cases)
    @rule(pick=PICKS, num_bytes=st.integers(0, 5))
    def send(self, pick, num_bytes):
        """One frame: so many bytes at most, and the groups that were not told yet."""
        case = self.case(pick)
        engine, reply = case.engine, case.reply
        body, engine.unsent = engine.unsent[:num_bytes], engine.unsent[num_bytes:]
        groups = engine.groups[engine.num_told :]
        engine.num_told = len(engine.groups)
        if engine.splice is not None:
            body = engine.splice.cut(body, is_last=False)
        kept_before = self.records.num_bytes
        assert reply.receive(body, bytes(groups)) == (bool(body) and not engine.has_sent)
        engine.has_sent = engine.has_sent or bool(body)
        case.client += body
        if groups and case.kept is not None:
            if kept_before + len(groups) > MAX_RECORD_BYTES:
                case.kept = None
            else:
                case.kept += groups

    @precondition(lambda self: self.cases)
    @rule(pick=PICKS)
    def lose(self, pick):
        """Its engine is gone; what was not sent is lost with it. Another one gets it, if it can."""
        case = self.case(pick)
        may = case.can_resume and case.kept is not None
        assert case.reply.can_go_on == (may or not case.client)
        if case.reply.can_go_on:
            self.dispatch(case)
        else:
            self.over(case)  # an error to the client

    @precondition(lambda self: self.cases)
    @rule(pick=PICKS, leaves=st.booleans())
    def end(self, pick, leaves):
        """The client is gone; or everything is generated and sent. The end may be said twice."""
        case = self.case(pick)
        if not leaves:
            self.generate(pick, len(case.whole))
            while case.engine.unsent or case.engine.num_told < len(case.engine.groups):
                self.send(pick, 5)
            assert bytes(case.client) == text(case.number, case.whole)
        self.over(case)

    def over(self, case):
        reply = self.cases.pop(case.number).reply
        reply.end()
        num_bytes = self.records.num_bytes
        reply.end()
        assert self.records.num_bytes == num_bytes
        assert reply.record == reply.generated == b""

    @invariant()
    def clients_have_the_beginning_of_their_reply(self):
        for case in self.cases.values():
            assert text(case.number, case.whole).startswith(bytes(case.client))
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
    with pytest.raises(
        ResumeSpliceError, match=r"^the other engine's response differs from what had been sent$"
    ):
        splice.cut(b"axe", is_last=False)
    with pytest.raises(
        ResumeSpliceError,
        match=r"^the other engine's response was shorter than what had been sent$",
    ):
        ResumeSplice(Resume(b"", 2, 0)).cut(b"a", is_last=True)


def test_what_is_given_up_stays_so():
    """Past the bound nothing more is kept, and who has begun to read cannot go on."""
    records = Records(3)
    reply = Reply(records, can_resume=True)
    assert reply.receive(b"a", b"\x01\x01\x01")  # as much as may be
    assert (records.num_bytes, reply.can_go_on) == (3, True)
    assert not reply.receive(b"b", b"\x01")
    assert (records.num_bytes, reply.can_go_on, reply.record) == (0, False, b"")
    assert not reply.receive(b"c", b"\x01")
    assert (records.num_bytes, reply.can_go_on, reply.record) == (0, False, b"")


def test_a_reply_that_cannot_be_resumed_is_counted_anew_at_each_engine():
    records = Records(3)
    reply = Reply(records, can_resume=False)
    reply.receive(b"", b"\x01\x01")
    assert (reply.generated, reply.record, records.num_bytes) == (b"\x01\x01", b"", 2)
    assert reply.resume() is None
    assert (reply.generated, records.num_bytes) == (b"", 0)
    reply.receive(b"", b"\x01\x01\x01\x01")  # given up for good
    assert reply.resume() is None
    reply.receive(b"", b"\x01")
    assert (reply.generated, records.num_bytes) == (b"", 0)


def test_bytes_without_a_record_are_compared_all_the_same():
    reply = Reply(Records(3), can_resume=True)
    reply.receive(b"ab", b"")
    reply.receive(b"c", b"")
    assert reply.resume() == Resume(b"", 3, zlib.crc32(b"abc"))


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
