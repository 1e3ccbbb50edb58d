r"""Which requests end engines? Who was on board when one died or hung, and what follows for them.

Bodies, by their fingerprint:

    clear --an engine dies or hangs under it at its prefill--> suspect
    suspect --a second one does, which it had to itself--> refused
    suspect --completes--> clear
    suspect, refused --`refuse_s` go by--> clear

"At its prefill": before it had generated more than a few tokens there. Whoever had was only
present, and goes on elsewhere at once. A suspect gets an engine to itself
(`router.scheduling.quarantine`), so that a second death tells who it was, and takes nobody along;
the innocent lose a little time by it.

What never happens: a third engine that dies at the prefill of one body; a body that is refused
although it never had an engine to itself. A body that ends engines in the middle of a long reply
may cost one more: at the first death it looks like whoever was present.
"""

import msgspec

from router.types import Request

# Tokens generated since its prefill that clear a request of what happens to its engine later.
PROVEN_TOKENS = 8
# Bodies that are remembered: more than engines have sequences when one dies.
_MAX_BODIES = 4096


class SuspectsState(msgspec.Struct, frozen=True, kw_only=True):
    """How many bodies are under suspicion, and how many are refused."""

    num_suspects: int
    num_refused: int  # bodies
    num_rejected: int  # requests of such bodies, since the start


class _Record(msgspec.Struct):
    """What is known against one body."""

    died_s: float  # when the last engine died or hung under it
    is_refused: bool = False
    may_probe: bool = True  # it has not been sent to a half-open engine yet


class Suspects:
    """Bodies under suspicion, and those that are refused; bounded, the oldest forgotten first."""

    def __init__(self, refuse_s: float) -> None:
        """`refuse_s`: how long anything is held against a body, seconds."""
        self.num_rejected = 0
        self._refuse_s = refuse_s
        self._records: dict[int | str, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def accuse(self, request: Request, now_s: float) -> None:
        """Suspect a body: an engine died or hung at its prefill, among others."""
        self._add(request, _Record(now_s, is_refused=self.is_refused(request, now_s)))

    def refuse(self, request: Request, now_s: float) -> None:
        """Refuse a body: an engine died or hung that it had to itself."""
        self._add(request, _Record(now_s, is_refused=True))

    def acquit(self, request: Request) -> bool:
        """Clear a body: it was answered. Return whether anything was held against it."""
        return self._records.pop(body_of(request), None) is not None

    def is_suspect(self, request: Request, now_s: float) -> bool:
        """Whether anything is held against the body of a request."""
        return self._get(request, now_s) is not None

    def is_refused(self, request: Request, now_s: float) -> bool:
        """Whether requests of this body are refused."""
        record = self._get(request, now_s)
        return record is not None and record.is_refused

    def died_s(self, request: Request, now_s: float) -> float:
        """Return when the last engine died or hung under the body of a suspect."""
        record = self._get(request, now_s)
        return record.died_s if record is not None else float("-inf")

    def try_probe(self, request: Request, now_s: float) -> bool:
        """Allow a suspect's body one probe of an engine. Return False if it had its own.

        Whatever becomes of a probe says more of the engine than of the request.
        """
        record = self._get(request, now_s)
        if record is None or not record.may_probe:
            return False
        record.may_probe = False
        return True

    def refused_until_s(self, request: Request, now_s: float) -> float:
        """Return until when the body of a request is refused; `now_s` if it is not."""
        record = self._get(request, now_s)
        return record.died_s + self._refuse_s if record is not None and record.is_refused else now_s

    def state(self) -> SuspectsState:
        """Return the counts."""
        num_refused = sum(record.is_refused for record in self._records.values())
        return SuspectsState(
            num_suspects=len(self._records) - num_refused,
            num_refused=num_refused,
            num_rejected=self.num_rejected,
        )

    def _add(self, request: Request, record: _Record) -> None:
        body = body_of(request)
        self._records.pop(body, None)  # to the end: the dictionary is in the order of deaths
        self._records[body] = record
        while len(self._records) > _MAX_BODIES:
            del self._records[next(iter(self._records))]

    def _get(self, request: Request, now_s: float) -> _Record | None:
        body = body_of(request)
        record = self._records.get(body)
        if record is not None and now_s >= record.died_s + self._refuse_s:
            del self._records[body]
            return None
        return record


def body_of(request: Request) -> int | str:
    """Return what requests of the same body have in common; its id where no body is known."""
    return request.fingerprint or request.id
