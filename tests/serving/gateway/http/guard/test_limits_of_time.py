"""How long may a client take, and what becomes of it? Timer by timer."""

import pytest

from tests.serving.gateway.http.guard.wire import KEEP_ALIVE_S, Wire, head, request, settle

HEAD_S, BODY_S, STALL_S = 3.0, 5.0, 7.0


async def test_a_head_has_its_time_from_the_connection_on():
    wire = Wire()
    assert wire.waits_s == [HEAD_S]
    await wire.send(b"POST /x HT", b"TP/1.1\r\n", b"content-length: 2\r\n")
    assert wire.waits_s == [HEAD_S]
    assert len(wire.timers) == 1  # no byte wins time
    wire.fire(HEAD_S)
    assert wire.transport.ended == "close"


async def test_a_body_has_its_own_time():
    wire = Wire()
    await wire.send(head("content-length: 4"))
    assert wire.waits_s == [BODY_S]
    await wire.send(b"{", b"}")
    assert wire.waits_s == [BODY_S]
    assert len(wire.timers) == 2
    await wire.send(b"  ")
    assert wire.waits_s == []  # the answer may take what it takes
    [asked] = wire.asked
    assert await asked.read() == b"{}  "
    await asked.answer()
    assert wire.waits_s == [KEEP_ALIVE_S]
    assert wire.transport.ended == ""


async def test_a_body_that_does_not_come_ends_the_connection():
    wire = Wire()
    await wire.send(head("content-length: 4"))
    wire.fire(BODY_S)
    assert wire.transport.ended == "close"


async def test_a_body_whose_answer_came_first_has_its_time_until_it_is_there():
    wire = Wire()
    await wire.send(head("content-length: 4"), b"{}")
    await wire.asked[0].answer()
    assert BODY_S in wire.waits_s
    await wire.send(b"  ")
    assert BODY_S not in wire.waits_s


async def test_the_next_request_has_its_time_from_its_first_byte():
    wire = Wire()
    await wire.send(request())
    await wire.asked[0].answer()
    assert wire.waits_s == [KEEP_ALIVE_S]
    await wire.send(b"POST")
    assert wire.waits_s == [HEAD_S]
    await wire.send(b" /x HTTP/1.1\r\ncontent-length: 2\r\n\r\n")
    assert wire.waits_s == [BODY_S]
    await wire.send(b"{}")
    assert wire.waits_s == []
    await wire.asked[1].answer()
    assert len(wire.asked) == 2


async def test_a_request_that_came_whole_and_early_has_no_limit_of_time():
    wire = Wire()
    await wire.send(request())
    await wire.send(request())
    assert wire.waits_s == []
    await wire.asked[0].answer()
    assert wire.waits_s == []
    await wire.asked[1].answer()
    assert wire.waits_s == [KEEP_ALIVE_S]


async def test_nor_has_one_that_came_in_one_piece_with_another():
    wire = Wire()
    await wire.send(request() + request())
    await wire.asked[0].answer()
    assert len(wire.asked) == 2
    assert wire.waits_s == []


@pytest.mark.parametrize("begun", [b"POST /x", head("content-length: 9")])
async def test_one_that_came_early_in_part_has_it_from_its_turn_on(begun):
    wire = Wire()
    await wire.send(request())
    await wire.send(begun)
    assert wire.waits_s == []
    await wire.asked[0].answer()
    assert wire.waits_s == [HEAD_S if begun == b"POST /x" else BODY_S]


async def test_behind_it_in_one_piece_neither():
    wire = Wire()
    await wire.send(request() + head("content-length: 9") + b"123")
    assert wire.waits_s == []
    await wire.asked[0].answer()
    assert wire.waits_s == [BODY_S]
    await wire.send(b"456789")
    assert wire.waits_s == []
    assert await wire.asked[1].read() == b"123456789"


async def test_a_client_that_does_not_read_is_cut():
    wire = Wire()
    await wire.send(request())
    wire.protocol.pause_writing()
    wire.protocol.pause_writing()
    assert wire.waits_s == [STALL_S]
    wire.protocol.resume_writing()
    wire.protocol.resume_writing()
    assert wire.waits_s == []
    wire.protocol.pause_writing()
    assert wire.waits_s == [STALL_S]
    wire.fire(STALL_S)
    assert wire.transport.ended == "abort"


async def test_a_client_that_does_not_read_holds_the_answer_back():
    wire = Wire()
    await wire.send(request())
    await wire.asked[0].start()
    wire.protocol.pause_writing()
    assert not wire.protocol.flow._is_writable_event.is_set()
    wire.protocol.resume_writing()
    assert wire.protocol.flow._is_writable_event.is_set()


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
async def test_who_is_gone_leaves_no_timer_and_no_count(error):
    wire = Wire()
    assert len(wire.counted) == 1
    await wire.send(head("content-length: 9"))
    wire.protocol.pause_writing()
    assert wire.waits_s == [BODY_S, STALL_S]
    wire.protocol.connection_lost(error)
    assert wire.waits_s == []
    assert len(wire.counted) == 0
    # What broke has closed by itself.
    assert wire.transport.ended == ("close" if error is None else "")
    assert await wire.asked[0].read() is None


async def test_who_is_gone_leaves_all_of_its_requests():
    wire = Wire()
    await wire.send(request() + request() + request())
    [first] = wire.asked
    assert await first.read() == b"{}"
    wire.protocol.connection_lost(None)
    await settle()
    assert (await first.receive())["type"] == "http.disconnect"
    waiting = [cycle for cycle, _ in wire.protocol.pipeline]
    assert len(waiting) == 2
    assert all(cycle.disconnected for cycle in waiting)


async def test_connections_are_counted_by_where_they_come_from():
    wire = Wire(max_per_client=1)
    assert wire.counted._num_by_client == {"192.0.2.1": 1}


async def test_far_too_many_are_cut_at_once():
    wire = Wire(max_connections=-15)
    assert wire.transport.ended == ""
    wire = Wire(max_connections=-16)
    assert wire.transport.ended == "abort"
