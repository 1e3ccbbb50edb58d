"""What a client of ours reads on the wire, byte by byte."""

import asyncio
from types import SimpleNamespace

import pytest

from serving.gateway.http.reply.own_client import OwnClient

DATE = [(b"date", b"today")]
CHUNKED = b"HTTP/1.1 200 OK\r\ndate: today\r\na: b\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection:
    """What uvicorn keeps of a request and its connection."""

    def __init__(self, *, keep_alive: bool = True, version: str = "1.1") -> None:
        self.writes: list[bytes] = []
        self.is_closed = False
        self.flow = SimpleNamespace(write_paused=False)
        self.transport = SimpleNamespace(write=self.writes.append, close=self._close)
        self.default_headers = DATE
        self.keep_alive = keep_alive
        self.scope = {"http_version": version, "state": {"request_id": "mine"}}
        self.disconnected = self.response_started = self.response_complete = False
        self.waiting_for_100_continue = True
        self.num_ends = 0
        self.client = OwnClient(self)  # type: ignore[arg-type]

    def _close(self) -> None:
        self.is_closed = True

    def on_response(self) -> None:
        self.num_ends += 1


def test_head_and_first_bytes_are_one_write():
    connection = Connection()
    client = connection.client
    client.start(200, [(b"A", b"b")])
    assert connection.response_started
    assert not connection.waiting_for_100_continue
    assert not connection.writes
    client.write(b"first")
    client.write(b"x" * 16)
    client.write(b"last", is_last=True)
    assert connection.writes == [
        CHUNKED + b"5\r\nfirst\r\n",
        b"10\r\n" + b"x" * 16 + b"\r\n",
        b"4\r\nlast\r\n0\r\n\r\n",
    ]
    assert connection.response_complete
    assert connection.num_ends == 1
    assert not connection.is_closed


def test_a_whole_reply_is_one_write():
    connection = Connection()
    connection.client.start(200, [(b"a", b"b")])
    connection.client.write(b"all", is_last=True)
    assert connection.writes == [CHUNKED + b"3\r\nall\r\n0\r\n\r\n"]


def test_no_bytes_are_no_chunk_before_the_end():
    connection = Connection()
    connection.client.start(200, [(b"a", b"b")])
    connection.client.write(b"")
    connection.client.write(b"")
    connection.client.write(b"", is_last=True)
    assert connection.writes == [CHUNKED, b"0\r\n\r\n"]


def test_what_has_a_length_has_no_chunks():
    connection = Connection()
    connection.client.start(404, [(b"content-length", b"5")])
    connection.client.write(b"abc")
    connection.client.write(b"de", is_last=True)
    head = b"HTTP/1.1 404 Not Found\r\ndate: today\r\ncontent-length: 5\r\n\r\n"
    assert connection.writes == [head + b"abc", b"de"]


@pytest.mark.parametrize(("body", "is_last"), [(b"abcdef", False), (b"abcd", True)])
def test_another_length_than_announced_is_an_error(body, is_last):
    connection = Connection()
    connection.client.start(200, [(b"content-length", b"5")])
    with pytest.raises(RuntimeError, match="long"):
        connection.client.write(body, is_last=is_last)
    assert not connection.writes
    assert not connection.num_ends


@pytest.mark.parametrize(
    "header", [(b"a", b"b\r\nx: y"), (b"a", b"b\nx: y"), (b"a\r\nx", b"y"), (b"a", b"\0")]
)
def test_a_header_does_not_break_out_of_its_line(header):
    connection = Connection()
    with pytest.raises(RuntimeError, match="header"):
        connection.client.start(200, [header])
    connection.client.start(500, [])  # another reply may be given instead
    connection.client.write(b"", is_last=True)
    assert connection.writes[0].startswith(b"HTTP/1.1 500 ")
    assert len(connection.writes) == 1


@pytest.mark.parametrize(
    ("keep_alive", "headers"), [(False, []), (True, [(b"Connection", b"Close")])]
)
def test_the_connection_closes_where_it_has_to(keep_alive, headers):
    connection = Connection(keep_alive=keep_alive)
    connection.client.start(200, headers)
    connection.client.write(b"", is_last=True)
    assert connection.writes[0].count(b"connection: close\r\n") == 1
    assert connection.writes[0].lower().count(b"connection:") == 1
    assert connection.is_closed


def test_an_old_client_gets_no_chunks():
    connection = Connection(version="1.0", keep_alive=False)
    connection.client.start(200, [])
    connection.client.write(b"ab")
    connection.client.write(b"c", is_last=True)
    head = b"HTTP/1.1 200 OK\r\ndate: today\r\nconnection: close\r\n\r\n"
    assert connection.writes == [head + b"ab", b"c"]
    assert connection.is_closed


@pytest.mark.parametrize("status", [204, 304])
def test_what_has_no_body_has_no_chunks(status):
    connection = Connection()
    connection.client.start(status, [])
    connection.client.write(b"", is_last=True)
    assert b"transfer-encoding" not in connection.writes[0]
    assert connection.writes[0].endswith(b"\r\n\r\n")


def test_how_an_engine_cuts_its_reply_is_not_passed_on():
    connection = Connection()
    connection.client.start(200, [(b"transfer-encoding", b"chunked"), (b"a", b"b")])
    connection.client.write(b"")
    assert connection.writes == [CHUNKED]


def test_who_has_left_gets_nothing():
    connection = Connection()
    connection.client.start(200, [])
    connection.disconnected = True
    connection.client.write(b"x", is_last=True)
    assert not connection.writes
    assert not connection.num_ends


def test_who_does_not_read_is_not_ready():
    connection = Connection()
    assert connection.client.is_ready
    connection.flow.write_paused = True
    assert not connection.client.is_ready


async def test_a_reply_that_breaks_off_is_logged_by_its_name(caplog):
    connection = Connection()
    connection.client.start(200, [])
    connection.client.write(b"x")
    connection.client.break_off(ZeroDivisionError("ours"))
    assert connection.is_closed
    assert not connection.num_ends
    [record] = caplog.records
    assert record.exc_info[1].__notes__ == ["request mine"]
    await asyncio.sleep(0)
