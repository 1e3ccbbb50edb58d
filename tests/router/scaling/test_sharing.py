"""Where there are not GPUs enough for all, what one model gives up another takes."""

import random

from router.scaling.sharing import Claim, share_out


def claim(wanted: int, *, held: int = 0, least: int = 0, gpus: int = 1) -> Claim:
    return Claim(num_gpus=gpus, num_least=least, num_wanted=wanted, num_held=held)


def test_all_get_what_they_want_if_it_is_there():
    assert share_out([claim(3), claim(1, gpus=4), claim(0, held=2)], 8) == [3, 1, 0]


def test_what_one_gives_up_another_takes():
    assert share_out([claim(6, held=6), claim(4, held=2)], 8) == [6, 2]
    assert share_out([claim(4, held=6), claim(4, held=2)], 8) == [4, 4]


def test_who_is_asked_gets_one_engine_though_another_holds_all():
    assert share_out([claim(8, held=8), claim(3)], 8) == [7, 1]


def test_what_always_runs_is_nobody_elses():
    assert share_out([claim(8, held=8), claim(2, least=2)], 8) == [6, 2]
    assert share_out([claim(8), claim(8, least=2)], 8) == [4, 4]


def test_the_one_with_fewest_gpus_grows_first():
    assert share_out([claim(9, gpus=2), claim(9)], 8) == [2, 4]


def test_an_engine_that_does_not_fit_leaves_its_room_to_smaller_ones():
    assert share_out([claim(2, gpus=4), claim(9)], 7) == [1, 3]
    assert share_out([claim(1, gpus=8), claim(1)], 8) == [0, 1]


def test_never_more_than_there_is_nor_than_is_wanted():
    for seed in range(300):
        rng = random.Random(seed)
        num_gpus = rng.randrange(1, 16)
        claims, left = [], num_gpus
        for _ in range(rng.randrange(1, 5)):
            gpus = rng.choice((1, 2, 4))
            least = rng.randrange(left // gpus + 1)
            left -= least * gpus
            wanted = least + rng.randrange(5)
            claims.append(claim(wanted, held=rng.randrange(6), least=least, gpus=gpus))
        shares = share_out(claims, num_gpus)
        used = sum(num * each.num_gpus for num, each in zip(shares, claims, strict=True))
        assert used <= num_gpus, seed
        for num, each in zip(shares, claims, strict=True):
            assert each.num_least <= num <= each.num_wanted, seed
            # Nothing that somebody could use is left over.
            assert num == each.num_wanted or each.num_gpus > num_gpus - used, seed
