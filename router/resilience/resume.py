r"""How does a reply outlive its engines? What there is of it, and how another engine goes on.

    empty --receive--> begun --end--> over
      |  ^               |  ^
      |  \----receive----/  |   bytes for the client, groups for the record
      \------resume---------/   another engine has it: the record is played through, which gives
                                the same bytes again; `ResumeSplice` drops those that the
                                client has, after comparing them

Groups are what the engine has generated, opaque here, and the bytes are made of them
(`serving.stream.record`). So that nothing is missing, an engine sends a group before, or with, the
first byte made of it: the record is never behind the client. It may be ahead.

What never happens: a byte that the client gets twice, or not at all; a second end; a record
kept for a reply that is over, or more kept than the bound of all records.
"""

import zlib

import msgspec


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """What an engine needs to go on with a reply that another one has begun."""

    record: bytes  # what was generated, in groups
    num_bytes: int  # of the body, that the client has
    checksum: int  # CRC-32 of these


class Records:
    """The records of all open replies together, bounded."""

    __slots__ = ("max_bytes", "num_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class Reply:
    """One request's reply, from whichever engine."""

    __slots__ = (
        "_can_resume",
        "_checksum",
        "_num_bytes",
        "_num_counted_tokens",
        "_record",
        "_records",
        "awaits_first_byte",
    )

    def __init__(self, records: Records, *, can_resume: bool) -> None:
        """Without `can_resume` the record only counts: once it has begun no other can go on."""
        self.awaits_first_byte = True  # from the engine that has it now
        self._records = records
        self._record: bytearray | None = bytearray()
        self._can_resume = can_resume
        self._num_bytes = 0
        self._checksum = 0
        self._num_counted_tokens = 0

    def only_count(self) -> None:
        """Let no other engine go on once it has begun: whoever has it now says that none can."""
        self._can_resume = False

    @property
    def has_begun(self) -> bool:
        """Whether the client has any of it."""
        return self._num_bytes > 0

    @property
    def can_go_on(self) -> bool:
        """Whether an engine can take it over: from the beginning, or from where it is."""
        return not self.has_begun or (self._can_resume and self._record is not None)

    @property
    def record(self) -> bytes:
        """What engines have generated of it, as far as another can go on from there."""
        return self.generated if self._can_resume else b""

    @property
    def generated(self) -> bytes:
        """What was generated for it, as far as it was kept; to be counted."""
        return bytes(self._record or b"")

    def resume(self) -> Resume | None:
        """Return what another engine needs to go on; None where nothing has been generated."""
        self.awaits_first_byte = True
        if not self._can_resume and self._record is not None:
            self._drop_record()  # it begins anew, and so does the count
            self._record = bytearray()
        if not self._num_bytes and not self.record:
            return None
        return Resume(self.record, self._num_bytes, self._checksum)

    def receive(self, body: bytes, groups: bytes) -> bool:
        """Take in what the engine sends; return whether it is the first byte of it from there.

        Past the bound of all records this one is given up.
        """
        if groups and self._record is not None:
            if self._records.num_bytes + len(groups) > self._records.max_bytes:
                self._drop_record()
            else:
                self._record += groups
                self._records.num_bytes += len(groups)
        if not body:
            return False  # progress of a reply that comes all at once
        return self.write(body)

    def write(self, body: bytes) -> bool:
        """Count bytes that the client gets; return whether they are the first from there."""
        self._num_bytes += len(body)
        self._checksum = zlib.crc32(body, self._checksum)
        is_first, self.awaits_first_byte = self.awaits_first_byte, False
        return is_first

    def count_new_tokens(self, num_tokens: int) -> int:
        """Return how many of the `num_tokens` in the record were not there at the last count.

        Negative where the record was given up: then the reply has to begin anew.
        """
        num_new = num_tokens - self._num_counted_tokens
        self._num_counted_tokens = num_tokens
        return num_new

    def end(self) -> None:
        """Forget the record: it is over, whichever way. A second end changes nothing."""
        self._drop_record()

    def _drop_record(self) -> None:
        self._records.num_bytes -= len(self._record or b"")
        self._record = None


class ResumeSpliceError(Exception):
    """The reply does not begin with what the client has of it."""


class ResumeSplice:
    """Cuts off a reply what the client has of it, in the engine that goes on."""

    __slots__ = ("_checksum", "_expected", "_num_left")

    def __init__(self, resume: Resume) -> None:
        self._num_left = resume.num_bytes
        self._checksum = 0
        self._expected = resume.checksum

    def cut(self, body: bytes, *, is_last: bool) -> bytes:
        """Return what of the next bytes the client lacks.

        Raises `ResumeSpliceError` if the others differ from what was sent.
        """
        if not self._num_left:
            return body
        known = body[: self._num_left]
        self._num_left -= len(known)
        self._checksum = zlib.crc32(known, self._checksum)
        if self._num_left and is_last:
            raise ResumeSpliceError(
                "the other engine's response was shorter than what had been sent"
            )
        if not self._num_left and self._checksum != self._expected:
            raise ResumeSpliceError("the other engine's response differs from what had been sent")
        return body[len(known) :]
