"""Shards through one engine: several in flight, so that the engine never drains while the longest response finishes.

Plain sequential code around `engine.step()`, without Ray, threads or queues; whoever owns the process calls `advance`
again and again. What a shard needs lives in the dataset, so a worker is told shard numbers and nothing else.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from distill_pipe.produce.chat import RenderedPrompt, Renderer, TooLongError
from distill_pipe.produce.engine import FinishedTrace, Request, RequestError, Response, ShardOutcome, TargetEngine
from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.produce.schedule import Work
from distill_pipe.redact import redacted
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import PlannedPrompt, read_planned_shard
from distill_pipe.store.root import Root
from distill_pipe.store.shard import QuarantinedPrompt

MESSAGE_CHARACTERS = 2000
# Asking the sink is a call into the engine's worker, which on a GPU would cost a part of every step.
OUTCOME_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Progress:
    """What happened during one `advance`: prompts done, tokens run through the target, shards decided, steps of the
    engine that had something to run, and the shards whose work so far is done (`passed`)."""

    prompts: int
    tokens: int
    outcomes: list[ShardOutcome]
    steps: int
    passed: list[int]


@dataclass(slots=True)
class _OpenShard:
    """A shard being run: the prompts that the engine still works on, and those given up on."""

    prompts: dict[int, tuple[PlannedPrompt, RenderedPrompt]] = field(default_factory=dict)
    quarantined: list[QuarantinedPrompt] = field(default_factory=list)
    last: bool = True


class ShardWorker:
    """Drives one engine over the shards it is given."""

    def __init__(self, engine: TargetEngine, renderer: Renderer, root: Root, run: Run) -> None:
        self._engine, self._renderer, self._root, self._run = engine, renderer, root, run
        self._open: dict[int, _OpenShard] = {}
        self._shard_of: dict[int, int] = {}
        self._undecided: set[int] = set()
        self._passed: list[int] = []
        self._asked = 0.0

    def advance(self, work: Iterable[Work], seconds: float) -> Progress:
        """Start `work`, then run the engine for about `seconds`."""
        for part in work:
            self._start(part)
        prompts = tokens = steps = 0
        deadline = time.monotonic() + seconds
        while True:
            steps += bool(self._shard_of)
            for response in self._engine.step():
                prompts += 1
                tokens += self._finish(response)
            outcomes = self._outcomes()
            if outcomes or self._passed or time.monotonic() > deadline:
                return self._progress(prompts, tokens, steps, outcomes)
            if not self._shard_of:
                time.sleep(0.02)  # nothing left to run: the sink is still writing

    def drain(self, seconds: float) -> Progress:
        """Wait for commits that are under way; nothing more is run."""
        outcomes = []
        deadline = time.monotonic() + seconds
        while self._undecided and time.monotonic() < deadline:
            outcomes += self._outcomes(at_once=True)
            time.sleep(0.02)
        return self._progress(0, 0, 0, outcomes)

    def _progress(self, prompts: int, tokens: int, steps: int, outcomes: list[ShardOutcome]) -> Progress:
        passed, self._passed = self._passed, []
        return Progress(prompts, tokens, outcomes, steps, passed)

    def _outcomes(self, *, at_once: bool = False) -> list[ShardOutcome]:
        """Shards decided since the last call; asks only while some are undecided, and not at every step."""
        now = time.monotonic()
        if not self._undecided or (self._shard_of and now - self._asked < OUTCOME_SECONDS and not at_once):
            return []
        self._asked = now
        outcomes = self._engine.outcomes()
        self._undecided -= {outcome.shard for outcome in outcomes}
        return outcomes

    def _start(self, work: Work) -> None:
        prompts, given_up = read_planned_shard(self._root, self._run, work.shard), dict(work.given_up)
        if work.shard not in self._open:
            self._open[work.shard] = _OpenShard(quarantined=[
                QuarantinedPrompt(p.ordinal, p.prompt_id, "engine", given_up[p.ordinal][:MESSAGE_CHARACTERS])
                for p in prompts if p.ordinal in given_up])
        opened = self._open[work.shard]
        opened.last = work.last
        for prompt in prompts:
            if prompt.ordinal in given_up or (work.ordinals is not None and prompt.ordinal not in work.ordinals):
                continue
            try:
                rendered = self._renderer.render_fitting(prompt.messages, self._run.spec)
                mask = rendered.loss_mask_T if self._run.spec.responses == "corpus" else ()
                self._engine.add(Request(prompt.ordinal, rendered.token_ids_T, mask))
            except (TemplateError, RequestError, TooLongError) as error:
                opened.quarantined.append(QuarantinedPrompt(prompt.ordinal, prompt.prompt_id, _CODES[type(error)],
                                                            redacted(str(error))[:MESSAGE_CHARACTERS]))
                continue
            opened.prompts[prompt.ordinal] = (prompt, rendered)
            self._shard_of[prompt.ordinal] = work.shard
        self._pass_if_done(work.shard)

    def _finish(self, response: Response) -> int:
        """Hand a finished prompt on; returns how many of its tokens ran through the target."""
        shard = self._shard_of.pop(response.ordinal)
        opened = self._open[shard]
        prompt, rendered = opened.prompts.pop(response.ordinal)
        token_ids, mask, reason = list(rendered.token_ids_T), list(rendered.loss_mask_T), "given"
        if self._run.spec.responses == "target":
            token_ids += response.token_ids
            mask += [True] * len(response.token_ids)
            reason = response.finish_reason
        if response.finish_reason in _WHOLE:
            self._engine.finish(shard, [FinishedTrace(prompt.ordinal, prompt.prompt_id, prompt.domain, reason,
                                                      token_ids, mask)])
        else:
            opened.quarantined.append(QuarantinedPrompt(prompt.ordinal, prompt.prompt_id, "engine",
                                                        f"the engine ended with {response.finish_reason!r}"))
        self._pass_if_done(shard)
        return len(token_ids)

    def _pass_if_done(self, shard: int) -> None:
        opened = self._open[shard]
        if opened.prompts:
            return
        if opened.last:
            del self._open[shard]
            self._undecided.add(shard)
            self._engine.commit(shard, opened.quarantined)
        self._passed.append(shard)


_WHOLE = ("stop", "length")
_CODES = {TemplateError: "template", RequestError: "engine", TooLongError: "too_long"}
