"""When a rank counts as hung, by what was heard of it. Time is the test's own."""

from __future__ import annotations

import pytest

from bc2exp.launch.signs import START_SECONDS, Signs


class House:
    """A parent that looks every half second at its ranks; `limit` is launch.hang_s."""

    def __init__(self, num_ranks=2, limit=60.0):
        self.time = 1000.0
        self.signs = Signs(range(num_ranks), limit, clock=lambda: self.time)
        self.says = {rank: {"phase": "start", "step": None, "exchanges": {}} for rank in range(num_ranks)}

    def at(self, rank, phase, step=None, world=0, **groups):
        self.says[rank] = {"phase": phase, "step": step, "exchanges": {"world": world, **groups}}

    def spend(self, seconds, mute=()):
        """Let time go by in which all ranks but `mute` give signs."""
        for _ in range(int(2 * seconds)):
            self.time += 0.5
            going = [rank for rank in self.says if rank not in mute]
            self.signs.look({"rank": rank, "pid": 100 + rank, **self.says[rank]} for rank in going)

    def train(self, steps, seconds=1.0, first=1):
        """Two exchanges a step on all ranks."""
        for step in range(first, first + steps):
            for part in (1, 2):
                for rank in self.says:
                    self.at(rank, "train", step, 2 * step + part)
                self.spend(seconds / 2)


def test_a_rank_that_gave_no_sign_for_as_long_as_allowed_is_silent():
    house = House()
    house.train(3)
    house.spend(59.5, mute=[1])
    assert house.signs.silent() == {}
    house.spend(1, mute=[1])
    assert list(house.signs.silent()) == [1]
    assert house.signs.silent()[1] == pytest.approx(60, abs=1)
    assert house.signs.ranks[1].words == "training, step 3"
    assert house.signs.ranks[1].pid == 101


def test_one_sign_makes_it_alive_again():
    house = House()
    house.train(3)
    house.spend(59, mute=[1])
    house.spend(0.5)
    house.spend(59, mute=[1])
    assert house.signs.silent() == {}


def test_a_rank_at_its_start_has_longer_whatever_is_allowed():
    house = House(limit=3.0)
    house.spend(START_SECONDS - 1, mute=[0, 1])
    assert house.signs.silent() == {}
    house.spend(2, mute=[0])
    assert list(house.signs.silent()) == [0]


def test_a_suspended_parent_finds_nobody_late():
    house = House()
    house.train(3)
    house.spend(30, mute=[1])
    house.time += 8 * 3600  # the lid was closed
    house.spend(28, mute=[1])
    assert house.signs.silent() == {}
    house.spend(2, mute=[1])
    assert list(house.signs.silent()) == [1]


def test_a_rank_that_has_ended_need_not_speak():
    house = House()
    house.train(3)
    house.signs.look([{"rank": 1, "pid": 101, "ended": True}])
    house.spend(200, mute=[1])
    assert house.signs.silent() == {}
    assert house.signs.behind() == {}


def test_null_is_never():
    house = House(limit=None)
    house.train(3)
    house.at(0, "train", 4, 9)
    house.spend(10_000, mute=[1])
    assert house.signs.silent() == {}
    assert house.signs.behind() == {}


def wait_for_rank_1(house, phase="train", step=4, **rank_0):
    """Rank 0 begins the next exchange, rank 1 does not come; so it is for three times the allowed minute."""
    house.at(0, **{"phase": "train", "step": 4, "world": 9, **rank_0})
    house.at(1, phase, step, 8)
    house.spend(180)
    return list(house.signs.behind())


def test_a_rank_that_lives_but_does_not_come_to_an_exchange_is_behind():
    house = House()
    house.train(3)
    house.at(0, "train", 4, 9)
    house.at(1, "train", 4, 8)
    house.spend(59)
    assert house.signs.behind() == {}
    house.spend(2)
    assert list(house.signs.behind()) == [1]
    assert house.signs.silent() == {}


@pytest.mark.parametrize("phase", ["save", "data", "load", "evaluate", "task=pretrain"])
def test_whoever_works_alone_lets_the_others_wait_for_good_reason(phase):
    house = House()
    house.train(3)
    assert wait_for_rank_1(house, phase) == []


def test_between_steps_is_training():
    house = House()
    house.train(3)
    assert wait_for_rank_1(house, "between", 3) == [1]


def test_the_first_step_may_take_any_time():
    house = House()
    house.spend(5)
    for rank in (0, 1):
        house.at(rank, "between", None, 1)
    house.spend(1)
    assert wait_for_rank_1(house, step=1) == []


def test_on_a_slow_machine_nobody_is_behind_for_a_little_longer_than_ever():
    house = House()
    house.train(2, seconds=200)
    assert wait_for_rank_1(house, step=3) == []
    house.spend(130)
    assert list(house.signs.behind()) == [1]


def test_all_that_wait_for_each_other_are_not_behind():
    house = House()
    house.train(3)
    house.spend(180)
    assert house.signs.behind() == {}


def test_exchanges_of_other_groups_are_not_compared():
    for late in ([], [3]):
        house = House(num_ranks=4)
        house.train(3)
        for rank, (group, begun) in enumerate((("left", 5), ("left", 5), ("right", 15), ("right", 15))):
            house.at(rank, "train", 4, 9, **{group: begun - (rank in late)})
        house.spend(180)
        assert list(house.signs.behind()) == late


def test_a_long_save_says_nothing_of_how_long_a_step_may_take():
    house = House()
    house.train(3)
    house.at(0, "save", 3, 8)
    house.spend(1000)
    house.at(0, "between", 3, 8)
    house.spend(1)
    house.train(2, first=4)
    house.at(0, "train", 6, 13)
    house.at(1, "train", 6, 12)
    house.spend(61)
    assert list(house.signs.behind()) == [1]


def test_ranks_of_other_machines_are_compared_but_not_found_silent():
    here, there = House(num_ranks=1), House(num_ranks=1)
    there.says = {7: there.says.pop(0)}
    there.signs = Signs([7], 60.0, clock=lambda: here.time)

    def spend(seconds, told=True):
        for _ in range(int(2 * seconds)):
            here.time += 0.5
            there.signs.look([{"rank": 7, "pid": 107, **there.says[7]}])
            latest = there.signs.latest() if told else []
            here.signs.look([{"rank": 0, "pid": 100, **here.says[0]}], latest)

    for step in (1, 2, 3):
        here.at(0, "train", step, step)
        there.at(7, "train", step, step)
        spend(1)
    here.at(0, "train", 3, 4)
    spend(61)
    assert list(here.signs.behind()) == [7]
    assert here.signs.elsewhere[7].words == "training, step 3"
    spend(30, told=False)  # a machine that tells nothing may be suspended
    assert here.signs.behind() == {}
    assert here.signs.silent() == {}
