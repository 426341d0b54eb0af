"""The in-order window, driven by random orders of completion."""

from __future__ import annotations

import random

import pytest

from agpo_megatron.controller.schedule import Fate, Taken, Window

ACCEPTED, UNIFORM, SET_ASIDE = Fate.ACCEPTED, Fate.UNIFORM, Fate.SET_ASIDE


def fate_of(position: int, accepts: float, fails: float) -> Fate:
    """What becomes of a position: fixed by the position alone, as by the samples of a real run."""
    drawn = random.Random(f"fate-{position}").random()
    if drawn < fails:
        return SET_ASIDE
    return ACCEPTED if random.Random(f"accepted-{position}").random() < accepts else UNIFORM


class Run:
    """A window with a trainer that takes a batch when it is ready and publishes later. ``begun``: batches that were
    formed, by position, when the position was begun."""

    def __init__(
        self, window: Window, order: random.Random, accepts: float = 1.0, fails: float = 0.0
    ) -> None:
        self.window, self.order, self.accepts, self.fails = window, order, accepts, fails
        self.running: list[int] = []
        self.begun: dict[int, int] = {}
        self.taken: list[Taken] = []
        self.ages: list[int] = []

    def advance(self) -> bool:
        """One event, chosen at random among those that can happen; False when none can."""
        window = self.window
        for position in window.admit():
            self.running.append(position)
            self.begun[position] = window.published
        events = [self.finish] * (4 if self.running else 0)
        waiting = window.formed > window.published
        if waiting:
            events.append(window.publish)
        elif window.formed < window.batches:
            events.append(self.take)
        if not self.running and not waiting and not self.can_take():
            return False
        self.order.choice(events)()
        return True

    def can_take(self) -> bool:
        before = len(self.taken)
        self.take()
        return len(self.taken) > before

    def take(self) -> None:
        if self.window.formed < self.window.batches and (found := self.window.take()):
            self.taken.append(found)
            weights = self.window.formed - 1
            self.ages += [weights - self.begun[p] for p in found.positions]

    def finish(self) -> None:
        position = self.running.pop(self.order.randrange(len(self.running)))
        self.window.finish(position, fate_of(position, self.accepts, self.fails))

    def to_the_end(self) -> list[Taken]:
        while self.advance():
            pass
        assert self.window.formed == self.window.published == self.window.batches, "stuck"
        return self.taken


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_prompts_form_batches_in_order_whatever_finishes_first(staleness: int) -> None:
    for seed in range(50):
        run = Run(Window(3, staleness, 6, cursor=30), random.Random(seed), accepts=0.5)
        expected = [Taken(list(range(p, p + 3)), [], p + 3) for p in range(30, 48, 3)]
        assert run.to_the_end() == expected
        assert max(run.begun) == 47, "nothing is begun for a batch that is not to be formed"


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_position_is_begun_exactly_when_its_batch_is_near_enough(staleness: int) -> None:
    window = Window(4, staleness, 100)
    assert window.admit() == list(range(4 * (staleness + 1)))
    for position in range(4):
        window.finish(position, ACCEPTED)
        assert window.admit() == []
    assert window.take() is not None
    assert window.admit() == [], "the weights after it are not on the servers yet"
    window.publish()
    first = 4 * (staleness + 1)
    assert window.admit() == list(range(first, first + 4))


def test_random_schedules_never_stick_nor_exceed_the_staleness() -> None:
    """1,000 of them, with dynamic sampling or without, groups that fail, and a trainer that is fast or slow."""
    worst: dict[tuple[bool, int], int] = {}
    for seed in range(1000):
        draw = random.Random(f"schedule-{seed}")
        size, staleness, batches = draw.randint(1, 5), draw.randint(0, 3), draw.randint(1, 8)
        samples = draw.random() < 0.5
        accepts = draw.choice([0.0, 0.1, 0.5, 1.0])
        factor = draw.choice([1, 2, 10])
        window = Window(size, staleness, batches, 0, factor * size if samples else None)
        run = Run(window, draw, accepts, draw.choice([0.0, 0.1]))
        taken = run.to_the_end()
        assert all(len(t.positions) == size for t in taken)
        assert max(run.ages) <= staleness + samples
        key = (samples, staleness)
        worst[key] = max(worst.get(key, 0), *run.ages)
        used = [p for t in taken for p in [*t.positions, *t.discarded]]
        assert len(used) == len(set(used))
        cursor = taken[-1].cursor
        skipped = [p for p in range(cursor) if fate_of(p, accepts, run.fails) is SET_ASIDE]
        assert sorted([*used, *skipped]) == list(range(cursor))
    assert worst == {
        (samples, staleness): staleness + samples
        for samples in (False, True)
        for staleness in range(4)
    }, "each bound is reached, so it is no weaker than it says"


def test_dynamic_sampling_takes_the_next_accepted_groups_in_any_order_of_completion() -> None:
    found = []
    for seed in range(100):
        run = Run(Window(4, seed % 3, 5, 0, 40), random.Random(seed), accepts=0.5, fails=0.05)
        found.append(run.to_the_end())
    assert all(taken == found[0] for taken in found)
    accepted = [p for p in range(found[0][-1].cursor) if fate_of(p, 0.5, 0.05) is ACCEPTED]
    assert [p for t in found[0] for p in t.positions] == accepted
    assert found[0][-1].cursor == accepted[-1] + 1, "what lies behind belongs to the next batch"


def test_uniform_groups_fill_a_batch_when_enough_has_been_looked_at() -> None:
    window = Window(3, 0, 1, 0, 6)
    assert window.admit() == [0, 1, 2]
    for position in range(6):
        window.finish(position, SET_ASIDE if position == 1 else UNIFORM)
        window.admit()
    assert window.take() is None, "five groups so far, one was set aside"
    window.finish(6, ACCEPTED)
    assert window.take() == Taken([6, 0, 2], [3, 4, 5], 7)


def test_dynamic_sampling_begins_what_is_expected_to_be_accepted() -> None:
    window = Window(8, 0, 100, 0, 80)
    assert len(window.admit()) == 8, "nothing is known yet"
    for position in range(8):
        window.finish(position, ACCEPTED if position % 4 == 0 else UNIFORM)
    assert window.acceptance == pytest.approx(3 / 9)
    begun = window.admit()
    # 2 accepted; 6 more at a third each would take 18, but all of them might be accepted.
    assert len(begun) == 14
    assert window.ready + window.open == 16
