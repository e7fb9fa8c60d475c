"""Who works on which shard: a state machine without Ray, clocks or threads. Calls are events, what they return are
commands for the driver, and every time is a number that the driver passes in.

Shards are pulled, several per engine, so that none waits for the longest response of another. When an engine dies, what
it worked on is suspected: each such shard is tried again alone. When that kills an engine too, the shard's prompts are
run in halves, one after the other, and a half that kills is halved again, until one prompt that has killed two engines
all by itself is given up on. The rest of its shard is kept. A machine that is lost accuses nobody.

The trade-off: a suspected shard runs by itself, which is slow, but an innocent one passes at the first try; and two
accidents that hit the same lone prompt cannot be told from poison.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

LONE_DEATHS = 2
START_DEATHS, BARREN_DEATHS = 3, 10


@dataclass(frozen=True, slots=True)
class Work:
    """A shard, or some prompts of one, for an engine. `ordinals` None means all of them; `given_up` are not run but
    quarantined, each for a reason. The shard is committed when the `last` of its work is done."""

    shard: int
    ordinals: tuple[int, ...] | None = None
    given_up: tuple[tuple[int, str], ...] = ()
    last: bool = True


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine or a shard failed, and whose fault it was (one of `FAILURE_CLASSES`)."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Start:
    """Find a place for an engine and start it."""

    engine: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Give an engine work."""

    engine: int
    work: Work


@dataclass(frozen=True, slots=True)
class Kill:
    """End an engine; its death is to be reported like any other."""

    engine: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A prompt is given up on; to be told, since the work that follows carries it."""

    shard: int
    ordinal: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The run cannot go on."""

    failure: Failure


Command = Start | Feed | Kill | Quarantine | Stop


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds without a sign of life after which an engine counts as dead: while it starts, and while it has work."""

    start_seconds: float = 3600.0
    stall_seconds: float = 1800.0


@dataclass(slots=True)
class _Trial:
    """A suspected shard, run alone, group after group. Group `at` is running, or all have passed. `torn` counts the
    engines that died while they wrote it."""

    shard: int
    groups: list[tuple[int, ...]]
    at: int = 0
    given_up: dict[int, str] = field(default_factory=dict)
    lone_deaths: Counter[int] = field(default_factory=Counter)
    torn: int = 0

    def work(self) -> Work:
        return Work(self.shard, self.groups[self.at], tuple(sorted(self.given_up.items())),
                    self.at == len(self.groups) - 1)

    def accuse(self, reason: str) -> tuple[int, str] | None:
        """The group that runs killed the engine, so its halves come last from now on, after all that may well pass:
        an attempt that finishes prompts shows that the engine is sound. Returns the prompt that is given up on, if one
        is."""
        passed, running, waiting = self.groups[:self.at], self.groups[self.at:self.at + 1], self.groups[self.at + 1:]
        self.at = 0
        if not running:
            self.torn += 1
            return None  # it died while it wrote the shard, which is no prompt's fault
        [group], guilty = running, None
        innocent = tuple(sorted(ordinal for part in passed for ordinal in part))
        self.lone_deaths -= Counter(dict.fromkeys(innocent, LONE_DEATHS))
        if len(group) == 1:
            [ordinal] = group
            self.lone_deaths[ordinal] += 1
            if self.lone_deaths[ordinal] >= LONE_DEATHS:
                guilty, group = (ordinal, reason), ()
                self.given_up[ordinal] = reason
        half = (len(group) + 1) // 2
        self.groups = [part for part in (innocent, *waiting, group[:half], group[half:]) if part] or [()]
        return guilty


@dataclass(slots=True)
class _Engine:
    """A place for an engine. `heard` is when it last showed a sign of life, once Ray has found room for it."""

    placed: bool = False
    ready: bool = False
    leaving: bool = False
    heard: float = 0.0
    shards: set[int] = field(default_factory=set)
    trial: _Trial | None = None

    @property
    def busy(self) -> bool:
        return bool(self.shards) or self.trial is not None


class Schedule:
    """The shards of a run and the engines that share them. `todo` is walked once and never held."""

    def __init__(self, todo: Iterable[int], engines: int, prompts_per_shard: int, num_prompts: int, in_flight: int,
                 limits: Limits = Limits()) -> None:
        self._todo, self._again = iter(todo), deque[int]()
        self._trials = deque[_Trial]()
        self._engines = [_Engine() for _ in range(engines)]
        self._per_shard, self._num_prompts = prompts_per_shard, num_prompts
        self._in_flight, self._limits = in_flight, limits
        self._start_deaths = self._barren_deaths = 0
        self._next, self._stopping = next(self._todo, None), False

    @property
    def finished(self) -> bool:
        """Whether every shard is decided."""
        return not self._has_work() and not any(engine.busy for engine in self._engines)

    @property
    def engines(self) -> int:
        """How many engines are ready."""
        return sum(engine.ready for engine in self._engines)

    @property
    def unplaced(self) -> bool:
        """Whether no engine has a place."""
        return not any(engine.placed for engine in self._engines)

    def start(self) -> list[Command]:
        """The first commands of a run."""
        return [Start(i) for i in range(len(self._engines))] if self._has_work() else []

    def stop(self) -> None:
        """Give out no more work."""
        self._stopping = True

    def placed(self, i: int, now: float) -> list[Command]:
        """An engine has a place and begins to start."""
        self._engines[i].placed, self._engines[i].heard = True, now
        return []

    def ready(self, i: int, now: float) -> list[Command]:
        """An engine can take work."""
        engine = self._engines[i]
        engine.placed, engine.ready, engine.heard = True, True, now
        self._start_deaths = 0
        return list(self._feed(i))

    def progressed(self, i: int, now: float, *, alive: bool, finished: int, passed: Set[int],
                   decided: Set[int]) -> list[Command]:
        """An engine reports: whether it ran at all, how many prompts it finished, the shards whose work so far is done
        (`passed`), and those that are committed (`decided`)."""
        engine = self._engines[i]
        if alive or not engine.busy:
            engine.heard = now
        if finished or decided:
            self._barren_deaths = 0
        engine.shards -= decided
        trial = engine.trial
        if trial is not None and trial.shard in decided:
            engine.trial = None
        elif trial is not None and trial.shard in passed:
            trial.at += 1
            if trial.at < len(trial.groups) and not self._stopping:
                return [Feed(i, trial.work())]
        return list(self._feed(i))

    def died(self, i: int, failure: Failure) -> list[Command]:
        """An engine is gone, by itself or after `Kill`. What it worked on goes back."""
        engine, self._engines[i] = self._engines[i], _Engine()
        commands: list[Command] = []
        if failure.kind == "infra":
            self._again.extendleft(sorted(engine.shards, reverse=True))
            if engine.trial is not None:
                engine.trial.at = 0
                self._trials.appendleft(engine.trial)
        else:
            commands = list(self._suspect(engine, failure))
            if stop := self._breaker(engine, failure):
                return [*commands, stop]
        return [*commands, Start(i)] if self._has_work() else commands

    def leaving(self, i: int) -> list[Command]:
        """The machine of an engine is about to go: it gets no more work, and is replaced when it has none left."""
        self._engines[i].leaving = True
        return list(self._feed(i))

    def tick(self, now: float) -> list[Command]:
        """Time has passed: engines that show no sign of life are killed."""
        return [Kill(i, Failure("engine", reason)) for i, engine in enumerate(self._engines)
                if (reason := self._overdue(engine, now))]

    def _overdue(self, engine: _Engine, now: float) -> str:
        silent = now - engine.heard
        if engine.placed and not engine.ready and silent > self._limits.start_seconds:
            return f"the engine did not start within {self._limits.start_seconds:g} s"
        if engine.ready and engine.busy and silent > self._limits.stall_seconds:
            return f"the engine ran no token for {self._limits.stall_seconds:g} s"
        return ""

    def _feed(self, i: int) -> Iterator[Command]:
        """Work for an engine up to its share: a suspected shard when it has nothing else, and then nothing beside."""
        engine = self._engines[i]
        if engine.leaving and not engine.busy:
            yield Kill(i, Failure("infra", "its machine is being drained"))
        if not engine.ready or engine.leaving or self._stopping or engine.trial is not None:
            return
        if self._trials and not engine.shards:
            engine.trial = self._trials.popleft()
            yield Feed(i, engine.trial.work())
            return
        while len(engine.shards) < self._in_flight and (shard := self._take()) is not None:
            engine.shards.add(shard)
            yield Feed(i, Work(shard))

    def _take(self) -> int | None:
        if self._again:
            return self._again.popleft()
        shard, self._next = self._next, next(self._todo, None)
        return shard

    def _has_work(self) -> bool:
        return bool(self._again or self._trials) or self._next is not None

    def _suspect(self, engine: _Engine, failure: Failure) -> Iterator[Command]:
        for shard in sorted(engine.shards):
            first = shard * self._per_shard
            self._trials.append(_Trial(shard, [tuple(range(first, min(first + self._per_shard, self._num_prompts)))]))
        if engine.trial is not None:
            if guilty := engine.trial.accuse(f"{LONE_DEATHS} engines died on this prompt alone: {failure.reason}"):
                yield Quarantine(engine.trial.shard, *guilty)
            self._trials.append(engine.trial)

    def _breaker(self, engine: _Engine, failure: Failure) -> Stop | None:
        """Engines that keep dying and finish nothing are no matter of prompts: of a shard with a few poisonous ones,
        some part soon passes. Nor is a shard that kills whoever writes it, though all of its prompts pass each time."""
        trial = engine.trial
        if trial is not None and trial.torn >= BARREN_DEATHS:
            return Stop(Failure(failure.kind, f"{trial.torn} engines died while they wrote shard {trial.shard}; the "
                                              f"last cause: {failure.reason}"))
        if engine.ready:
            self._barren_deaths += 1
            deaths, limit, when = self._barren_deaths, BARREN_DEATHS, "without finishing a prompt"
        else:
            self._start_deaths += 1
            deaths, limit, when = self._start_deaths, START_DEATHS, "in a row while they started"
        if deaths < limit:
            return None
        return Stop(Failure(failure.kind, f"engines died {deaths} times {when}; the last cause: {failure.reason}"))


def shards_in_flight(max_num_seqs: int, prompts_per_shard: int) -> int:
    """How many shards an engine holds. Two suffice where a shard fills the batch several times over; where it does not,
    the batch must still be full when the last prompts of one shard, two or three shards back, are yet running."""
    return max(2, 1 + math.ceil(3 * max_num_seqs / prompts_per_shard))
