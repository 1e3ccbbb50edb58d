"""How much may a client send, and what is it told? Byte by byte."""

import json
import logging

import httptools
import pytest

from tests.serving.gateway.http.guard.wire import KEEP_ALIVE_S, Wire, head, request, settle

MAX = 1000
CHUNKED = head("transfer-encoding: chunked")


def refused(wire: Wire) -> tuple[int, str, str]:
    """Status, type and message of a refusal, after which nothing is read and the end comes."""
    reply = wire.take_reply()
    assert reply.headers["connection"] == "close"
    assert reply.headers["content-length"] == str(len(reply.body))
    assert wire.transport.ended == "eof"
    assert wire.transport.is_reading
    assert wire.waits_s == [1.0]
    error = reply.error
    assert (error["param"], error["code"]) == (None, reply.status)
    return reply.status, error["type"], error["message"]


TOO_LARGE = (
    431,
    "Request Header Fields Too Large",
    f"The request's head is larger than gateway.max_head_bytes ({MAX} bytes).",
)


def long_head(num_bytes: int) -> bytes:
    """A head of so many bytes, the last of which is missing."""
    begin = b"POST /x HTTP/1.1\r\nx: "
    return begin + b"y" * (num_bytes - len(begin) - 3) + b"\r\n\r"


class TestHeads:
    async def test_may_have_so_many_bytes_on_the_wire(self):
        wire = Wire()
        await wire.send(long_head(MAX))
        assert not wire.transport.written
        await wire.send(b"\n")
        assert len(wire.asked) == 1

    async def test_may_have_as_many_the_second_time(self):
        wire = Wire()
        for _ in range(2):
            await wire.send(long_head(MAX), b"\n")
            await wire.asked[-1].answer()
        assert len(wire.asked) == 2

    @pytest.mark.parametrize("pieces", [1, 7, 100])
    async def test_and_no_more(self, pieces):
        wire = Wire()
        data = long_head(MAX + 1)
        size = -(-len(data) // pieces)
        await wire.send(*(data[start : start + size] for start in range(0, len(data), size)))
        assert refused(wire) == TOO_LARGE
        assert not wire.asked

    @pytest.mark.parametrize(("num_more", "is_refused"), [(0, False), (1, True)])
    async def test_of_one_piece_count_by_what_is_in_them(self, num_more, is_refused):
        """Name, value and path: what comes with it is the body's."""
        body = b"z" * 5000
        size = len("/x") + len("content-length") + len("5000") + len("x")
        value = "y" * (MAX - size + num_more)
        wire = Wire()
        await wire.send(head("content-length: 5000", f"x: {value}") + body)
        assert len(wire.asked) == (not is_refused)
        if is_refused:
            assert refused(wire) == TOO_LARGE
        else:
            assert await wire.asked[0].read() == body

    async def test_count_anew_for_each_request(self):
        wire = Wire()
        for _ in range(3):
            await wire.send(head(f"x: {'y' * 900}", "content-length: 0"))
            await wire.asked[-1].answer()
        assert len(wire.asked) == 3

    async def test_that_are_refused_are_told_their_own_id(self):
        wire = Wire()
        await wire.send(head("x-request-id: mine", f"x: {'y' * MAX}"))
        assert wire.take_reply().headers["x-request-id"] == "mine"


class TestBodies:
    async def test_may_be_long_and_are_no_heads(self):
        wire = Wire()
        await wire.send(head("content-length: 9000"), *[b"x" * 1000] * 9)
        assert await wire.asked[0].read() == b"x" * 9000
        await wire.asked[0].answer()
        assert wire.waits_s == [KEEP_ALIVE_S]

    async def test_may_come_in_the_smallest_chunks(self):
        """Six bytes for each that counts."""
        wire = Wire()
        await wire.send(CHUNKED, *[b"1\r\nx\r\n"] * 900)
        await wire.send(b"0\r\n\r\n")
        assert await wire.asked[0].read() == b"x" * 900

    async def test_may_have_as_much_framing_as_a_head_and_no_more(self):
        extension = b";" + b"e" * 989  # with the rest of the chunk: 1000 beyond six for its byte
        chunk = b"1" + extension + b"\r\nx\r\n"
        for num_more, is_refused in ((0, False), (1, True)):
            wire = Wire()
            more = b"e" * (num_more + MAX + 6 - len(chunk))
            await wire.send(CHUNKED, chunk.replace(b";", b";" + more, 1))
            assert bool(wire.transport.written) == is_refused
            if is_refused:
                assert refused(wire) == TOO_LARGE

    async def test_may_not_have_more_of_it_in_many_pieces(self):
        wire = Wire()
        await wire.send(CHUNKED, *[b"1;%b\r\nx\r\n" % (b"e" * 194)] * 5)
        assert not wire.transport.written
        await wire.send(b"1;%b\r\nx\r\n" % (b"e" * 194))
        assert refused(wire) == TOO_LARGE

    async def test_may_not_have_many_small_trailers(self):
        wire = Wire()
        await wire.send(CHUNKED, b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n")
        await wire.send(*[b"t: %b\r\n" % (b"y" * 300)] * 4, b"u")
        assert refused(wire) == TOO_LARGE

    async def test_may_have_trailers_as_large_as_a_head_and_no_larger(self):
        """Beside a body for whose framing they would pass."""
        for num_more, is_refused in ((0, False), (1, True)):
            wire = Wire()
            await wire.send(CHUNKED, b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n")
            await wire.send(b"t: %b\r\nu" % (b"y" * (MAX - 1 + num_more)))
            assert bool(wire.transport.written) == is_refused
            if is_refused:
                assert refused(wire) == TOO_LARGE

    async def test_trailers_are_no_headers(self):
        wire = Wire()
        await wire.send(CHUNKED + b"2\r\n{}\r\n0\r\nx-evil: 1\r\n\r\n")
        assert wire.asked[0].scope["headers"] == [(b"transfer-encoding", b"chunked")]
        await wire.asked[0].answer()
        await wire.send(CHUNKED + b"0\r\nt: %b\r\n\r\n" % (b"y" * 900))
        await wire.asked[1].answer()
        await wire.send(CHUNKED + b"0\r\nt: %b\r\n\r\n" % (b"y" * 900))
        assert len(wire.asked) == 3  # each is counted by itself

    async def test_stop_the_reading_where_the_application_does_not_read(self):
        wire = Wire()
        await wire.send(head("content-length: 100000"), b"x" * 70_000)
        assert not wire.transport.is_reading


class TestEarlyBytes:
    async def test_are_kept_up_to_a_head_then_wait_in_the_network(self):
        wire = Wire()
        await wire.send(request())
        await wire.send(b"x" * (MAX - 1))
        assert wire.transport.is_reading
        await wire.send(b"x")
        assert not wire.transport.is_reading
        assert bytes(wire.protocol._early) == b"x" * MAX

    async def test_are_read_when_it_is_their_turn(self):
        wire = Wire()
        await wire.send(request(path="/1"))
        await wire.send(request(path="/2") + request(path="/3"), b"POST /4")
        assert len(wire.asked) == 1
        for number in range(3):
            await wire.asked[number].answer()
            assert len(wire.asked) == min(3, number + 2)
            assert wire.take_reply().status == 200
        assert wire.transport.is_reading
        await wire.send(b" HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        assert [each.scope["path"] for each in wire.asked] == ["/1", "/2", "/3", "/4"]

    async def test_of_one_piece_with_it_are_read_and_wait(self):
        wire = Wire()
        await wire.send(request(path="/1") + request(path="/2"))
        assert wire.transport.is_reading  # to hear that the client leaves
        await wire.send(b"more")
        assert bytes(wire.protocol._early) == b"more"

    async def test_are_forgotten_after_a_refusal(self):
        wire = Wire()
        await wire.send(request() + b"\x00\x01")
        assert not wire.transport.written  # after the reply before it
        await wire.send(b"more" * 1000)
        assert not wire.protocol._early
        await wire.asked[0].answer()
        written = wire.take()
        assert written.count(b"HTTP/1.1 200") == written.count(b"HTTP/1.1 400") == 1
        assert written.index(b" 200 ") < written.index(b" 400 ")
        assert wire.transport.ended == "eof"

    async def test_are_not_read_where_the_connection_has_ended(self):
        wire = Wire()
        await wire.send(request())
        await wire.send(request())
        wire.transport.close()
        await wire.asked[0].answer()
        assert len(wire.asked) == 1


class TestNotHttp:
    async def test_is_told_why(self):
        wire = Wire()
        await wire.send(b"\x00\x01\x02")
        status, kind, words = refused(wire)
        assert (status, kind) == (400, "Bad Request")
        assert words.startswith("This is not HTTP: ")
        assert "None" not in words
        await wire.send(request())
        assert not wire.asked
        wire.fire(1.0)
        assert wire.transport.ended == "close"

    async def test_a_url_that_is_none_is_told_as_such(self):
        wire = Wire()
        await wire.send(head(path="http://[/x"))
        status, kind, words = refused(wire)
        assert (status, kind) == (400, "Bad Request")
        assert "url" in words.lower()

    async def test_what_our_own_code_raises_is_not_the_clients_fault(self, monkeypatch, caplog):
        wire = Wire()

        def fail(url: bytes) -> None:
            raise ZeroDivisionError("ours")

        monkeypatch.setattr(httptools, "parse_url", fail)
        with caplog.at_level(logging.ERROR):
            await wire.send(request())
        assert refused(wire) == (500, "InternalServerError", "Internal server error")
        assert "a request's head cannot be read" in caplog.text
        assert "ZeroDivisionError: ours" in caplog.text

    async def test_of_another_version_is_told_so(self):
        wire = Wire()
        await wire.send(head("content-length: 0", version="2.0"))
        assert refused(wire) == (505, "HTTP Version Not Supported", "HTTP/2.0 is not spoken.")
        assert not wire.asked

    async def test_tunnels_are_told_so(self):
        wire = Wire()
        await wire.send(b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\nhidden")
        assert refused(wire) == (405, "Method Not Allowed", "This is no proxy.")
        assert not wire.asked

    async def test_without_a_half_close_the_connection_closes(self):
        wire = Wire(can_write_eof=False)
        await wire.send(b"\x00")
        assert wire.transport.ended == "close"

    async def test_in_a_body_ends_the_request(self):
        wire = Wire()
        await wire.send(CHUNKED, b"xyz\r\n")
        assert refused(wire)[0] == 400
        assert await wire.asked[0].read() is None

    async def test_in_a_body_whose_reply_has_begun_only_ends_the_connection(self):
        wire = Wire()
        await wire.send(CHUNKED)
        await wire.asked[0].start((b"content-length", b"2"))
        await wire.asked[0].write(b"o", more_body=True)
        wire.take()
        await wire.send(b"xyz\r\n")
        assert wire.transport.ended == "close"
        assert not wire.transport.written

    async def test_in_a_body_that_waits_its_turn_ends_that_alone(self):
        wire = Wire()
        await wire.send(request() + CHUNKED + b"xyz\r\n")
        assert len(wire.protocol.pipeline) == 0
        assert not wire.transport.written
        await wire.asked[0].answer()
        assert len(wire.asked) == 1
        assert wire.take().count(b"HTTP/1.1 ") == 2

    async def test_in_a_body_that_was_answered_already_is_told(self):
        wire = Wire()
        await wire.send(CHUNKED)
        await wire.asked[0].answer()
        wire.take()
        await wire.send(b"xyz\r\n")
        assert wire.take_reply().status == 400


async def test_one_too_many_is_told_so_with_its_first_request():
    wire = Wire(max_connections=0)
    await wire.send(request())
    reply = wire.take_reply()
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert json.loads(reply.body)["error"]["type"] == "ServiceUnavailableError"
    assert not wire.asked


class TestOffers:
    @pytest.mark.parametrize(
        ("connection", "kept"),
        [
            ("Upgrade", ""),
            ("keep-alive, Upgrade, HTTP2-Settings", "keep-alive"),
            ("close,upgrade", "close"),
            ("keep-alive, Upgrade, te", "keep-alive, te"),
        ],
    )
    async def test_are_taken_out_of_the_head(self, connection, kept):
        wire = Wire()
        offer = (f"connection: {connection}", "upgrade: h2c", "HTTP2-Settings: AAM")
        await wire.send(head("X-Mine: 1", *offer, "content-length: 2", path="/a?b=c") + b"{}")
        [asked] = wire.asked
        assert asked.scope["headers"] == [
            (b"x-mine", b"1"),
            (b"connection", kept.encode()),
            (b"content-length", b"2"),
        ]
        assert (asked.scope["path"], asked.scope["query_string"]) == ("/a", b"b=c")
        assert (asked.scope["method"], asked.scope["http_version"]) == ("POST", "1.1")
        assert await asked.read() == b"{}"

    async def test_on_a_connection_that_closes_leave_nothing_to_be_said(self):
        """What comes after the last request is nobody's, as without an offer."""
        wire = Wire()
        offer = ("connection: close, upgrade", "upgrade: h2c")
        await wire.send(head(*offer, "content-length: 2") + b"{}junk")
        await wire.asked[0].answer()
        assert wire.take_reply().status == 200
        assert wire.transport.ended == "close"

    async def test_keep_the_version(self):
        wire = Wire()
        await wire.send(
            head("connection: upgrade", "upgrade: x", "content-length: 0", version="1.0")
        )
        assert wire.asked[0].scope["http_version"] == "1.0"


class TestHttp10:
    async def test_gets_a_length_where_there_is_one(self):
        wire = Wire()
        await wire.send(request(version="1.0"))
        assert await wire.asked[0].read() == b"{}"
        await wire.asked[0].answer(b"all")
        written = wire.take()
        assert written.endswith(b"content-length: 3\r\nconnection: close\r\n\r\nall")
        assert wire.transport.ended == "close"

    async def test_gets_the_end_of_the_connection_where_there_is_none(self):
        wire = Wire()
        await wire.send(request(version="1.0"))
        [asked] = wire.asked
        await asked.start()
        for piece in (b"some", b"", b"more"):
            await asked.write(piece, more_body=True)
        await asked.write(b"", more_body=False)
        asked.is_over.set()
        await settle()
        head_, _, body = wire.take().partition(b"\r\n\r\n")
        assert body == b"somemore"
        assert b"transfer-encoding" not in head_
        assert b"connection: close" in head_
        assert wire.transport.ended == "close"

    async def test_is_not_told_half_of_what_it_was_promised(self):
        wire = Wire()
        await wire.send(request(version="1.0"))
        await wire.asked[0].start((b"content-length", b"5"))
        with pytest.raises(RuntimeError, match="shorter"):
            await wire.asked[0].write(b"abc", more_body=False)

    async def test_and_1_1_gets_chunks(self):
        wire = Wire()
        await wire.send(request())
        await wire.asked[0].answer(b"all", is_sized=False)
        assert wire.take_reply().body == b"all"
        assert wire.transport.ended == ""
