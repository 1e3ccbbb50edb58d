"""Requests that are answered without an ASGI application: what is told of them, and when."""

from serving.gateway.http.reply.own_client import OwnClient
from tests.serving.gateway.http.guard.wire import KEEP_ALIVE_S, Wire, head, request, settle


class Call:
    """One request as it is told of."""

    def __init__(self, scope: dict, client: OwnClient, told: list[tuple]) -> None:
        self.path, self.client, self._told = scope["path"], client, told
        self.wants_body = True

    def tell(self, *what: object) -> None:
        self._told.append((self.path, *what))

    def begin(self) -> bool:
        self.tell("begin")
        return self.wants_body

    def on_body(self, data: bytes) -> bool:
        self.tell("body", data)
        return True

    def on_body_end(self) -> None:
        self.tell("end")

    def on_ready(self) -> None:
        self.tell("ready")

    def on_left(self) -> None:
        self.tell("left")

    def answer(self) -> None:
        self.client.start(200, [(b"content-length", b"2")])
        self.client.write(b"ok", is_last=True)


class Calls:
    """All requests whose path begins with /call; others are ASGI's."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.calls: list[Call] = []

    def open(self, scope: dict, client: OwnClient) -> Call | None:
        if not scope["path"].startswith("/call"):
            return None
        self.calls.append(Call(scope, client, self.told))
        return self.calls[-1]

    def take(self) -> list[tuple]:
        told = self.told[:]
        self.told.clear()
        return told


def made() -> tuple[Calls, Wire]:
    calls = Calls()
    return calls, Wire(open_call=calls.open)


async def test_a_request_in_one_piece():
    calls, wire = made()
    await wire.send(request(b"abc", path="/call"))
    assert calls.take() == [("/call", "begin"), ("/call", "body", b"abc"), ("/call", "end")]
    assert not wire.waits_s
    assert not wire.asked
    calls.calls[0].answer()
    assert wire.take_reply().body == b"ok"
    assert wire.waits_s == [KEEP_ALIVE_S]


async def test_a_request_in_many_pieces_has_its_time_limited():
    calls, wire = made()
    await wire.send(b"POST /call HTTP/1.1\r\n")
    assert wire.waits_s == [3.0]
    await wire.send(b"content-length: 4\r\n\r\na")
    assert wire.waits_s == [5.0]
    await wire.send(b"bc")
    assert wire.waits_s == [5.0]
    assert len([timer for timer in wire.timers if timer.delay_s == 5.0]) == 1  # not set anew
    await wire.send(b"d")
    assert not wire.waits_s
    assert [what[1:] for what in calls.take()] == [
        ("begin",),
        ("body", b"a"),
        ("body", b"bc"),
        ("body", b"d"),
        ("end",),
    ]


async def test_requests_of_one_piece_wait_their_turn():
    calls, wire = made()
    await wire.send(
        request(b"1", path="/call1") + request(b"2", path="/asgi") + request(b"3", path="/call3")
    )
    assert {what[0] for what in calls.take()} == {"/call1"}
    calls.calls[0].answer()
    await settle()
    [asked] = wire.asked
    assert not calls.take()
    await asked.answer()
    assert calls.take() == [("/call3", "begin"), ("/call3", "body", b"3"), ("/call3", "end")]
    calls.calls[1].answer()
    assert wire.take().count(b"HTTP/1.1 200") == 3


async def test_half_a_request_behind_another_has_its_time_from_its_turn():
    calls, wire = made()
    await wire.send(request(path="/call1") + head("content-length: 4", path="/call2") + b"a")
    assert not wire.waits_s
    calls.take()
    calls.calls[0].answer()
    assert wire.waits_s == [5.0]
    assert calls.take() == [("/call2", "begin"), ("/call2", "body", b"a")]
    await wire.send(b"bcd")
    assert calls.take() == [("/call2", "body", b"bcd"), ("/call2", "end")]
    assert not wire.waits_s


async def test_who_waits_for_a_word_gets_it_if_the_body_is_wanted():
    for wants_body in (True, False):
        calls, wire = made()
        opened = calls.open

        def open_call(scope, client, opened=opened, wants_body=wants_body):
            call = opened(scope, client)
            call.wants_body = wants_body
            return call

        wire.protocol._open_call = open_call
        await wire.send(head("content-length: 2", "expect: 100-continue", path="/call"))
        assert (wire.take() == b"HTTP/1.1 100 Continue\r\n\r\n") == wants_body


async def test_who_leaves_is_told_of_once():
    calls, wire = made()
    await wire.send(request(path="/call1") + request(path="/call2"))
    calls.take()
    wire.protocol.connection_lost(None)
    assert calls.take() == [("/call1", "left")]  # nobody has heard of the other
    calls.calls[0].answer()
    assert not wire.take()


async def test_a_body_that_is_no_http_ends_its_request():
    calls, wire = made()
    await wire.send(head("transfer-encoding: chunked", path="/call"), b"xyz\r\n")
    assert [what[1] for what in calls.take()] == ["begin", "left"]
    assert wire.take_reply().status == 400
    assert wire.transport.ended == "eof"


async def test_who_reads_again_is_told_of():
    calls, wire = made()
    await wire.send(request(path="/call"))
    calls.take()
    wire.protocol.pause_writing()
    assert not calls.calls[0].client.is_ready
    wire.protocol.resume_writing()
    assert calls.take() == [("/call", "ready")]
    assert calls.calls[0].client.is_ready
    calls.calls[0].answer()
    wire.protocol.pause_writing()
    wire.protocol.resume_writing()
    assert not calls.take()
    assert 7.0 not in wire.waits_s


async def test_the_body_of_a_refused_request_is_read_and_its_time_limited():
    calls, wire = made()
    await wire.send(head("content-length: 4", path="/call") + b"a")
    calls.calls[0].answer()
    calls.take()
    assert 5.0 in wire.waits_s
    await wire.send(b"b")
    assert 5.0 in wire.waits_s
    await wire.send(b"cd")
    assert 5.0 not in wire.waits_s
    assert not calls.take()
    await wire.send(request(path="/call2"))
    assert calls.take()[0] == ("/call2", "begin")
