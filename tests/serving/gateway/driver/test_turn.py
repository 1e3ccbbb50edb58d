"""When do readers of exchanges read what has come?"""

import asyncio

from serving.gateway.exchange import Turn


async def test_what_comes_alone_is_read_in_the_next_turn_of_the_loop():
    turn, read = Turn(), []
    turn.add(lambda: read.append("a"))
    turn.add(lambda: read.append("b"))
    assert not read
    await asyncio.sleep(0)
    assert read == ["a", "b"]


async def test_what_comes_in_one_piece_is_read_at_its_end():
    turn, read = Turn(), []
    turn.hold()
    turn.add(lambda: read.append("a"))
    await asyncio.sleep(0)
    assert not read
    turn.add(lambda: read.append("b"))
    turn.release()
    assert read == ["a", "b"]
    turn.hold()
    turn.release()
    await asyncio.sleep(0)
    assert read == ["a", "b"]


async def test_what_waits_for_the_next_turn_goes_along_and_is_not_read_twice():
    turn, read = Turn(), []
    turn.add(lambda: read.append("a"))
    turn.hold()
    turn.add(lambda: read.append("b"))
    turn.release()
    assert read == ["a", "b"]
    await asyncio.sleep(0)
    assert read == ["a", "b"]


async def test_who_is_told_while_others_read_has_a_turn_of_its_own():
    turn, read = Turn(), []

    def read_and_tell() -> None:
        read.append("a")
        turn.add(lambda: read.append("b"))

    turn.hold()
    turn.add(read_and_tell)
    turn.release()
    assert read == ["a"]
    await asyncio.sleep(0)
    assert read == ["a", "b"]


async def test_one_that_fails_keeps_nobody_from_reading(caplog):
    turn, read = Turn(), []
    turn.hold()
    turn.add(lambda: read.append(1 // 0))
    turn.add(lambda: read.append("b"))
    turn.release()
    assert read == ["b"]
    assert "ZeroDivisionError" in caplog.text
