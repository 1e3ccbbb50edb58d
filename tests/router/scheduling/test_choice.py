"""What is found by indices is what looking at every engine and every request would find."""

import random
from collections.abc import Iterator

import pytest

from router.core.settings import RouterSettings
from router.fleet.admission import Admission, accepts_work, admission, kv_need_tokens
from router.fleet.fleet import Fleet
from router.fleet.replica import Replica
from router.queueing.hold_queue import HoldQueue
from router.scheduling.backfill import Reservations
from router.scheduling.policies import make_policy
from router.scheduling.policies.headway import num_new_tokens
from router.types import BlockUpdate, Request, RequestClass
from tests.support.builders import make_replica, req, snapshot

SEEDS = range(20)


class EveryEngine:
    """A fleet beside what is known of it: who is what since when, by the order of changes."""

    def __init__(self, rng: random.Random, num_engines: int) -> None:
        self.rng = rng
        self.fleet = Fleet()
        self.replicas: dict[str, Replica] = {}
        self.seqs: dict[str, int] = {}
        # As dictionaries keep them: what is there stays in its place, what comes is last.
        self.filed: dict[Admission, dict[str, Replica]] = {kind: {} for kind in Admission}
        self.working: dict[str, Replica] = {}
        for number in range(num_engines):
            self.come(f"r{number}")

    def come(self, replica_id: str) -> None:
        replica = make_replica(replica_id, max_prefill_chunk=50)
        self.replicas[replica_id], self.seqs[replica_id] = replica, 0
        self.fleet.add(replica)
        self.note(replica)

    def go(self, replica_id: str) -> None:
        del self.replicas[replica_id]
        self.fleet.remove(replica_id)
        for filed in (*self.filed.values(), self.working):
            filed.pop(replica_id, None)

    def note(self, replica: Replica) -> None:
        is_now = admission(replica)
        for kind, filed in self.filed.items():
            if kind is is_now:
                filed[replica.id] = replica
            else:
                filed.pop(replica.id, None)
        if accepts_work(replica):
            self.working[replica.id] = replica
        else:
            self.working.pop(replica.id, None)

    def change(self) -> None:
        """Change one engine, of many alike; some come, go, drain or begin a prompt."""
        rng = self.rng
        replica_id = rng.choice([*self.replicas])
        kind = rng.random()
        if kind < 0.05 and len(self.replicas) > 2:
            self.go(replica_id)
            return
        if kind < 0.1:
            self.come(f"r{rng.randrange(10**6)}")
            return
        replica = self.replicas[replica_id]
        if kind < 0.3:
            num_tokens = rng.choice([10, 80])
            replica.book(req(f"q{rng.random()}", num_tokens), num_tokens, now_s=0.0)
        elif kind < 0.33:
            replica.is_draining = not replica.is_draining
        else:
            self.seqs[replica_id] += 1
            num_pending = rng.choice([0, 0, 60, 300])
            state = snapshot(
                self.seqs[replica_id],
                last_booking=10**9,
                num_running_reqs=rng.choice([0, 1, 8]),
                num_free_kv_tokens=rng.choice([0, 150, 150, 600, 10_000]),
                num_pending_prefill_tokens=num_pending,
                num_step_demand_tokens=min(num_pending, 50),
            )
            replica.receive(state, now_s=0.0)
        self.fleet.refresh(replica)
        self.note(replica)

    def accepting(self, request: Request, *, short: bool) -> Iterator[Replica]:
        yield from self.filed[Admission.ANY].values()
        for replica in self.filed[Admission.SHORT_ONLY].values() if short else ():
            if replica.is_short(replica.num_new_tokens(request)):
                yield replica


def ids(replicas) -> list[str]:
    return [replica.id for replica in replicas]


@pytest.mark.parametrize("num_engines", [1, 3, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_engines_with_room_are_found_in_their_order(seed, num_engines):
    rng = random.Random(seed)
    world = EveryEngine(rng, num_engines)
    num_found = 0
    for _ in range(200):
        world.change()
        request = req("a", rng.choice([1, 40, 60, 500]))
        need_tokens = kv_need_tokens(request)
        for short in (True, False):
            expected = [
                each
                for each in world.accepting(request, short=short)
                if need_tokens <= each.room_tokens
            ]
            assert ids(world.fleet.with_room(request, need_tokens, short=short)) == ids(expected)
            num_found += len(expected)
            takers = list(world.filed[Admission.ANY].values())
            if short:
                takers += world.filed[Admission.SHORT_ONLY].values()
            assert world.fleet.any_accepts("m", short=short) == bool(takers)
            for beside in (None, rng.choice([*world.replicas])):
                rooms = [each.room_tokens for each in takers if each.id != beside]
                most = world.fleet.most_room("m", short=short, beside=beside)
                assert most == max(rooms, default=float("-inf"))
        assert ids(world.fleet.working("m")) == ids(world.working.values())
        assert world.fleet.any_works("m") == bool(world.working)
        shorts = world.filed[Admission.SHORT_ONLY].values()
        as_short = any(each.is_short(each.num_new_tokens(request)) for each in shorts)
        assert world.fleet.any_accepts_as_short(request) == as_short
    assert num_found > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_reserved_is_the_one_that_lacks_the_least(seed):
    """The first of the readiest in the order in which engines began to work."""
    rng = random.Random(seed)
    world = EveryEngine(rng, 12)
    queue = HoldQueue(RouterSettings())
    reservations = Reservations(world.fleet, queue)
    held = [
        req(f"h{number}", rng.choice([40, 500]), arrival_s=rng.random()) for number in range(40)
    ]
    for request in held:
        queue.push(request)
    for _ in range(200):
        world.change()
        request = rng.choice(held)
        reserved = reservations._reserved
        holders = {holder_id: replica_id for replica_id, (_, holder_id) in reserved.items()}
        former = world.working.get(holders.get(request.id, ""))
        available = [
            each
            for each in world.working.values()
            if each.id not in reserved
            or reserved[each.id][1] == request.id
            or queue.key(request) < reserved[each.id][0]
        ]
        assert ids(reservations.available_to(request, list(world.working.values()))) == ids(
            available
        )
        reservations.reserve(request)
        if former is not None:
            assert reservations.reserved_for(request) == former.id
        elif not available:
            assert reservations.reserved_for(request) is None
        else:
            need_tokens = kv_need_tokens(request)
            readiest = max(
                available,
                key=lambda each: (
                    (True, -each.num_pending_prefill_tokens)
                    if need_tokens <= each.room_tokens
                    else (False, each.num_free_kv_tokens)
                ),
            )
            assert reservations.reserved_for(request) == readiest.id


@pytest.mark.parametrize("tenants", [("",), ("a", "b", "c")])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_front_of_a_queue_is_how_its_order_begins(seed, tenants):
    """Also while requests come and go at the front, and tenants begin and cease to wait."""
    rng = random.Random(seed)
    queue = HoldQueue(RouterSettings())
    held: list[str] = []
    num_kept = 0
    former: list[Request] = []
    for number in range(600):
        if rng.random() < (0.7 if number < 300 else 0.3) or not held:
            request = req(
                f"q{number}",
                rng.choice([10, 10, 200, 1000]),
                arrival_s=rng.choice([number / 100.0, 1.0]),
                tenant=rng.choice(tenants),
                priority_class=rng.choice([RequestClass.STANDARD, RequestClass.BATCH]),
            )
            queue.push(request)
            held.append(request.id)
        else:
            first = [each.id for each in queue.front("m", 5)[:3]]
            gone = rng.choice(first) if rng.random() < 0.5 else rng.choice(held)
            held.remove(gone)
            queue.remove(gone)
        order = list(queue.in_order("m"))
        front = queue.front("m", 9)
        assert front == order[: len(front)]
        assert len(front) >= min(9, len(order))
        assert len(front) <= 2 * 9
        num_kept += front is former
        former = front
    assert num_kept > (50 if len(tenants) == 1 else -1)  # what changes behind it keeps it


def test_tokens_before_a_key_are_counted_exactly_by_ranges():
    rng = random.Random(0)
    queue = HoldQueue(RouterSettings(ttft_target_s_per_token=0.01))
    held: dict[str, Request] = {}
    for number in range(500):
        if rng.random() < 0.6 or not held:
            request = req(f"q{number}", rng.randrange(1, 3000), arrival_s=rng.random())
            held[request.id] = request
            queue.push(request)
        else:
            queue.remove(held.pop(rng.choice([*held])).id)
        newcomer = req("next", rng.randrange(1, 3000), arrival_s=1.0)
        last = int(queue.key(newcomer)[0] / 0.125)
        expected = sum(
            each.num_prompt_tokens
            for each in held.values()
            if int(queue.key(each)[0] / 0.125) <= last
        )
        assert queue.num_tokens_before(newcomer) == expected


@pytest.mark.parametrize("num_holders", [0, 3, 70, 150])
@pytest.mark.parametrize("seed", range(5))
def test_candidates_of_a_large_fleet_are_those_drawn_and_the_first_that_hold_the_prefix(
    seed, num_holders
):
    replicas = [make_replica(f"r{number}") for number in range(150)]
    for replica in random.Random(seed).sample(replicas, num_holders):
        replica.prefix_cache.receive(BlockUpdate(since=-1, until=1, stored=[7, 8]))
    request = req("a", 64, block_hashes=(7, 8, 9), block_ends=(16, 32, 48))
    candidates = make_policy("headway", random.Random(seed), ())._draw_candidates(request, replicas)
    start = int(random.Random(seed).random() * len(replicas))
    rotated = [*replicas[start:], *replicas[:start]]
    holders = [replica for replica in rotated if 7 in replica.prefix_cache]
    assert ids(candidates) == ids(dict.fromkeys([*holders[:64], *rotated[:64]]))


def test_new_tokens_at_many_engines_are_those_at_each():
    rng = random.Random(0)
    replicas = [make_replica(f"r{number}") for number in range(50)]
    for replica in replicas:
        held = list(range(rng.randrange(6)))
        replica.prefix_cache.receive(BlockUpdate(since=-1, until=1, stored=held))
        for text in range(rng.randrange(4)):
            replica.prefix_cache.coming[text] = 1
    for num_tokens in (0, 1, 20, 100):
        for blocks in ((), (0, 1, 2, 3, 4)):
            request = req(
                "a",
                num_tokens,
                block_hashes=blocks,
                block_ends=tuple(16 * (block + 1) for block in blocks),
                prefix_hashes=rng.choice([(), (0, 1, 2)]),
                prefix_block_share=0.3,
            )
            assert num_new_tokens(request, replicas) == [
                replica.num_new_tokens(request) for replica in replicas
            ]
