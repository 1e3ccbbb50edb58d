"""Who runs a batch, and is each line's answer kept once?"""

from collections import Counter
from pathlib import Path

import pytest

from serving.config import ConfigError
from serving.config.batch import BatchConfig
from serving.gateway.http.endpoints.batch.database import Database
from serving.gateway.http.endpoints.batch.files import Files
from serving.gateway.http.endpoints.batch.objects import Batch, BatchError, BatchUsage, StoredFile
from serving.gateway.http.endpoints.batch.store import LEASE_S, BatchStore, Result, write_results


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A folder, and gateways that share it."""

    def __init__(self, folder: Path, **settings) -> None:
        self.clock = Clock()
        self.config = BatchConfig(dir=folder, **settings)
        self.database = Database(folder, self.clock)
        self.files = Files(self.config, self.database)

    def gateway(self, name: str) -> BatchStore:
        return BatchStore(self.database, self.files, name)

    def add_file(self, tenant: str = "", size: int = 10) -> StoredFile:
        path = self.files.new_path()
        path.write_bytes(b"x" * size)
        return self.files.add(tenant, "in.jsonl", "batch", path, None)

    def add_batch(self, store: BatchStore, tenant: str = "", size: int = 10) -> Batch:
        file = self.add_file(tenant, size)
        return store.add(file, "/v1/chat/completions", "24h", 86_400, None, None)


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    yield found
    found.database.close(lambda: None)


def test_one_gateway_runs_a_batch_until_its_lease_lapses(world):
    one, other = world.gateway("one"), world.gateway("other")
    batch = world.add_batch(one)
    assert one.claim(Counter()).id == batch.id
    assert other.claim(Counter()) is None
    assert other.renew(batch.seq) is None
    world.clock.now_s += LEASE_S - 1
    assert one.renew(batch.seq) is not None
    world.clock.now_s += LEASE_S - 1
    assert other.claim(Counter()) is None
    world.clock.now_s += 2
    assert one.claim(Counter()) is None  # never twice in one gateway
    assert other.claim(Counter()).id == batch.id


def test_who_has_lost_the_lease_changes_nothing(world):
    one, other = world.gateway("one"), world.gateway("other")
    seq = world.add_batch(one).seq
    one.claim(Counter())
    one.begin(seq, 2, None)
    world.clock.now_s += LEASE_S + 1
    other.claim(Counter())
    result = [Result(1, False, b"{}")]
    assert one.record(seq, result, BatchUsage()) is None
    assert one.begin_finalizing(seq) is None
    assert one.fail(seq, [BatchError("a", "b")]) is None
    assert one.end(seq, "completed", None, None) is None
    assert other.answered_lines(seq) == set()
    assert other.renew(seq).status == "in_progress"


def test_a_clock_that_was_set_back_leaves_no_batch_behind(world):
    one, other = world.gateway("one"), world.gateway("other")
    world.add_batch(one)
    one.claim(Counter())
    world.clock.now_s -= 3600
    assert other.claim(Counter()) is not None


def test_a_line_has_one_answer(world):
    store = world.gateway("one")
    seq = world.add_batch(store).seq
    store.claim(Counter())
    store.begin(seq, 3, "m")
    usage = BatchUsage(10, 2, 5, 1)
    store.record(seq, [Result(2, False, b"first"), Result(3, True, b"bad")], usage)
    batch = store.record(seq, [Result(2, False, b"second"), Result(1, False, b"one")], usage)
    assert (batch.completed, batch.failed) == (2, 1)
    assert batch.usage.input_tokens == 20
    assert store.answered_lines(seq) == {1, 2, 3}
    outputs, errors = world.files.new_path(), world.files.new_path()
    assert write_results(world.database.path, seq, outputs, errors) == (2, 1)
    assert outputs.read_bytes() == b"one\nfirst\n"
    batch = store.end(seq, "completed", outputs, errors)
    assert world.files.path(batch.output_file_id).read_bytes() == b"one\nfirst\n"
    assert world.files.path(batch.error_file_id).read_bytes() == b"bad\n"
    assert store.answered_lines(seq) == set()
    assert store.claim(Counter()) is None


def test_a_batch_that_is_cancelled_goes_no_other_way(world):
    store = world.gateway("one")
    seq = world.add_batch(store).seq
    batch = store.claim(Counter())
    assert store.cancel("", batch.id).status == "cancelling"
    assert store.cancel("another", batch.id) is None
    assert store.begin(seq, 2, None).status == "cancelling"
    assert store.begin_finalizing(seq).status == "cancelling"
    assert store.end(seq, "cancelled", None, None).status == "cancelled"
    assert store.cancel("", batch.id).status == "cancelled"


def test_who_has_fewest_running_is_next(world):
    store = world.gateway("one")
    for tenant in ("a", "a", "b"):
        world.add_batch(store, tenant)
    running = Counter()
    for expected in ("a", "b", "a"):
        batch = store.claim(running)
        assert batch.tenant == expected
        running[batch.tenant] += 1


def test_the_largest_tenants_oldest_results_make_room(tmp_path):
    world = World(tmp_path, max_bytes=2**20, max_file_bytes=2**19)
    store = world.gateway("one")
    ended = []
    for tenant, size in (("small", 1000), ("large", 300_000), ("large", 300_000)):
        seq = world.add_batch(store, tenant, size).seq
        store.claim(Counter())
        store.begin(seq, 0, None)
        ended.append(store.end(seq, "completed", None, None))
    running = world.add_batch(store, "large", 1000)
    assert world.files.make_room(100_000)
    assert store.find("large", ended[1].id) is not None
    assert world.files.make_room(500_000)
    assert store.find("large", ended[1].id) is None  # the oldest of the largest
    assert world.files.find("large", ended[1].input_file_id) is None
    assert store.find("small", ended[0].id) is not None
    assert not world.files.make_room(2**20)
    assert store.find("large", running.id) is not None
    assert world.files.find("large", running.input_file_id) is not None
    world.database.close(lambda: None)


def test_what_was_kept_long_enough_is_removed(world):
    store = world.gateway("one")
    seq = world.add_batch(store).seq
    store.claim(Counter())
    ended = store.end(seq, "failed", None, None)
    unused, running = world.add_file(), world.add_batch(store)
    left_over = world.files.new_path()
    left_over.touch()
    world.files.remove_old()
    assert store.find("", ended.id) is not None
    assert left_over.exists()  # it may be somebody's who is at it
    world.clock.now_s += world.config.keep_s + 1
    world.files.remove_old()
    assert store.find("", ended.id) is None
    assert world.files.find("", unused.id) is None
    assert world.files.find("", running.input_file_id) is not None


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"batch\.dir"):
        Database(tmp_path / "file")
