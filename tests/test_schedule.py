"""Catches a scheduler that loses or doubles a shard, feeds an engine that is not there, blames an innocent prompt, or
goes on for ever. The world here is made up: engines are lists of work, prompts kill or do not, and accidents happen."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipe.produce.schedule import (
    BARREN_DEATHS,
    LONE_DEATHS,
    START_DEATHS,
    Command,
    Failure,
    Feed,
    Kill,
    Limits,
    Quarantine,
    Schedule,
    Start,
    Stop,
    Work,
    shards_in_flight,
)

DEATH, NODE = Failure("engine", "it died"), Failure("infra", "its machine is gone")


@dataclass
class World:
    """A run with made-up engines. `poison` kills an engine whenever it is run; with `accidents` any of an engine's
    steps may be its last, before or after what it did is known."""

    shards: int
    per_shard: int
    engines: int
    poison: set[int]
    accidents: float
    luck: random.Random
    in_flight: int = 2
    held: dict[int, list[Work]] = field(default_factory=dict)
    traces: Counter[int] = field(default_factory=Counter)
    quarantined: Counter[int] = field(default_factory=Counter)
    committed: Counter[int] = field(default_factory=Counter)
    deaths: int = 0
    stopped: Stop | None = None
    lone_accidents: Counter[int] = field(default_factory=Counter)

    def run(self) -> "World":
        self.schedule = Schedule(range(self.shards), self.engines, self.per_shard, self.shards * self.per_shard,
                                 self.in_flight)
        self.obey(self.schedule.start())
        steps = 0
        while not self.schedule.finished and self.stopped is None:
            steps += 1
            assert steps < 20_000, "it goes on for ever"
            self.step(self.luck.choice(sorted(self.held)))
        return self

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                assert command.engine not in self.held
                self.held[command.engine] = []
                self.obey(self.schedule.placed(command.engine, 0))
                self.obey(self.schedule.ready(command.engine, 0))
            elif isinstance(command, Feed):
                held = self.held[command.engine]
                held.append(command.work)
                assert len({w.shard for w in held}) <= self.in_flight
                if any(w.ordinals is not None for w in held):
                    assert len({w.shard for w in held}) == 1, "a suspected shard is not alone"
            elif isinstance(command, Stop):
                self.stopped = command
            else:
                assert isinstance(command, Quarantine)

    def step(self, engine: int) -> None:
        held = self.held[engine]
        if not held:
            return self.report(engine, 0, set(), set())
        work = held[0]
        ordinals = self.ordinals(work)
        if self.poison & ordinals:
            return self.die(engine, DEATH, ordinals)
        kind = self.luck.choice([DEATH, NODE])
        if self.luck.random() < self.accidents:
            return self.die(engine, kind, ordinals)
        decided = set()
        if work.last:
            decided = {work.shard}
            self.commit(work)
        if self.luck.random() < self.accidents:
            return self.die(engine, kind, ordinals)
        held.pop(0)
        return self.report(engine, len(ordinals), {work.shard}, decided)

    def ordinals(self, work: Work) -> set[int]:
        whole = range(work.shard * self.per_shard, (work.shard + 1) * self.per_shard)
        return set(whole if work.ordinals is None else work.ordinals) - {o for o, _ in work.given_up}

    def commit(self, work: Work) -> None:
        """As the store does: the first attempt counts, every other adopts it."""
        self.committed[work.shard] += 1
        if self.committed[work.shard] == 1:
            given_up = {o for o, _ in work.given_up}
            whole = set(range(work.shard * self.per_shard, (work.shard + 1) * self.per_shard))
            self.traces.update(whole - given_up)
            self.quarantined.update(given_up)

    def report(self, engine: int, finished: int, passed: set[int], decided: set[int]) -> None:
        self.obey(self.schedule.progressed(engine, 0, alive=True, finished=finished, passed=passed, decided=decided))

    def die(self, engine: int, failure: Failure, ordinals: set[int]) -> None:
        self.deaths += 1
        if len(ordinals) == 1 and not self.poison & ordinals:
            self.lone_accidents.update(ordinals)
        del self.held[engine]
        self.obey(self.schedule.died(engine, failure))


@settings(max_examples=300)
@given(shards=st.integers(1, 12), per_shard=st.integers(1, 9), engines=st.integers(1, 4),
       in_flight=st.integers(1, 4), accidents=st.sampled_from([0.0, 0.02, 0.2]), seed=st.integers(0, 2**32),
       data=st.data())
def test_every_prompt_ends_in_a_trace_or_in_quarantine_and_in_one_of_them(
        shards: int, per_shard: int, engines: int, in_flight: int, accidents: float, seed: int,
        data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, shards * per_shard - 1), max_size=2))
    world = World(shards, per_shard, engines, poison, accidents, random.Random(seed), in_flight).run()
    if world.stopped is not None:
        assert world.deaths >= BARREN_DEATHS
        assert accidents
        return
    everyone = Counter(range(shards * per_shard))
    assert world.traces + world.quarantined == everyone
    assert set(world.committed) == set(range(shards))
    assert poison <= set(world.quarantined)
    for innocent in set(world.quarantined) - poison:
        assert world.lone_accidents[innocent] >= LONE_DEATHS
    if not accidents:
        assert set(world.committed.values()) == {1}


@given(per_shard=st.integers(1, 128), where=st.integers(0, 127))
def test_a_poisonous_prompt_costs_the_logarithm_of_its_shard_in_engines_and_no_other_prompt(per_shard: int,
                                                                                            where: int) -> None:
    poison = where % per_shard
    world = World(3, per_shard, 1, {poison}, 0, random.Random(0)).run()
    assert world.stopped is None
    assert set(world.quarantined) == {poison}
    assert world.deaths <= (per_shard - 1).bit_length() + 3


@given(st.sets(st.integers(0, 63), min_size=3, max_size=6))
def test_several_poisonous_prompts_in_one_shard_are_all_found(poison: set[int]) -> None:
    world = World(4, 64, 2, poison, 0, random.Random(0)).run()
    assert world.stopped is None
    assert set(world.quarantined) == poison


def test_an_engine_that_dies_whatever_it_is_given_stops_the_run() -> None:
    world = World(50, 8, 2, set(range(400)), 0, random.Random(0)).run()
    assert world.stopped == Stop(Failure("engine", f"engines died {BARREN_DEATHS} times without finishing a prompt; "
                                                   "the last cause: it died"))
    assert not world.committed


def test_a_shard_that_kills_whoever_writes_it_stops_the_run_though_its_prompts_pass() -> None:
    made = schedule(shards=1)
    made.ready(0, 0)
    for _ in range(BARREN_DEATHS):
        assert made.died(0, DEATH) == [Start(0)]
        assert made.ready(0, 0) == [Feed(0, Work(0, (0, 1, 2, 3)))]
        made.progressed(0, 0, alive=True, finished=4, passed={0}, decided=set())
    assert made.died(0, DEATH) == [Stop(Failure("engine", f"{BARREN_DEATHS} engines died while they wrote shard 0; "
                                                          "the last cause: it died"))]


def schedule(shards: int = 4, engines: int = 1, **limits: float) -> Schedule:
    made = Schedule(range(shards), engines, 4, 4 * shards, 2, Limits(**limits))
    assert made.start() == [Start(i) for i in range(engines)]
    return made


def test_engines_that_never_get_ready_stop_the_run_and_one_that_does_starts_the_count_anew() -> None:
    made = schedule()
    for _ in range(START_DEATHS - 1):
        made.placed(0, 0)
        assert made.died(0, DEATH) == [Start(0)]
    made.ready(0, 0)
    made.died(0, DEATH)
    for _ in range(START_DEATHS - 1):
        assert made.died(0, DEATH) == [Start(0)]
    [stop] = made.died(0, DEATH)
    assert stop == Stop(Failure("engine", f"engines died {START_DEATHS} times in a row while they started; the last "
                                          "cause: it died"))


def test_a_lost_machine_accuses_nobody() -> None:
    made = schedule()
    assert made.ready(0, 0) == [Feed(0, Work(0)), Feed(0, Work(1))]
    for _ in range(100):
        assert made.died(0, NODE) == [Start(0)]
        assert made.ready(0, 0) == [Feed(0, Work(0)), Feed(0, Work(1))]


def test_shards_of_a_dead_engine_are_tried_alone_one_after_the_other() -> None:
    made = schedule()
    made.ready(0, 0)
    assert made.died(0, DEATH) == [Start(0)]
    assert made.ready(0, 0) == [Feed(0, Work(0, (0, 1, 2, 3)))]
    quiet = {"alive": True, "finished": 4}
    assert made.progressed(0, 0, passed={0}, decided=set(), **quiet) == []
    assert made.progressed(0, 0, passed=set(), decided={0}, **quiet) == [Feed(0, Work(1, (4, 5, 6, 7)))]
    assert made.progressed(0, 0, passed={1}, decided={1}, **quiet) == [Feed(0, Work(2)), Feed(0, Work(3))]


def test_an_engine_that_shows_no_sign_of_life_is_killed_and_an_idle_one_is_not() -> None:
    made = schedule(shards=2, engines=2, start_seconds=10, stall_seconds=5)
    made.placed(0, 0)
    assert made.tick(100) != [], "placed, and never ready"
    made.ready(0, 100)
    made.ready(1, 100)
    assert made.tick(104) == []
    made.progressed(0, 104, alive=True, finished=0, passed=set(), decided=set())
    made.progressed(1, 104, alive=False, finished=0, passed=set(), decided=set())
    assert made.tick(108) == []
    [kill] = made.tick(110)
    assert kill == Kill(0, Failure("engine", "the engine ran no token for 5 s"))
    # An engine that waits for a place is Ray's matter, however long it takes.
    made.died(0, kill.failure)
    assert made.tick(10_000) == []


def test_an_engine_on_a_machine_that_is_drained_ends_what_it_has_and_is_replaced() -> None:
    made = schedule()
    made.ready(0, 0)
    assert made.leaving(0) == []
    quiet = {"alive": True, "finished": 4, "passed": set()}
    assert made.progressed(0, 0, decided={0}, **quiet) == []
    [kill] = made.progressed(0, 0, decided={1}, **quiet)
    assert kill == Kill(0, Failure("infra", "its machine is being drained"))
    assert made.died(0, kill.failure) == [Start(0)]
    assert made.ready(0, 0) == [Feed(0, Work(2)), Feed(0, Work(3))]


def test_a_run_that_is_asked_to_stop_gives_out_no_more_work() -> None:
    made = schedule()
    made.ready(0, 0)
    made.stop()
    assert made.progressed(0, 0, alive=True, finished=4, passed={0}, decided={0}) == []
    assert not made.finished


@pytest.mark.parametrize(("sequences", "prompts", "shards"), [(64, 64, 4), (64, 1024, 2), (256, 64, 13), (1, 1, 4)])
def test_enough_shards_are_in_flight_to_keep_the_batch_full(sequences: int, prompts: int, shards: int) -> None:
    assert shards_in_flight(sequences, prompts) == shards
