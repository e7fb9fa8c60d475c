"""An engine for `--target fake`: everything of a run but the model. Try a cluster, a store or a job file with it, at no
cost and without vLLM; it is also what the tests of faults run on.

What it captures goes through the head reduction, codecs, sink and commit of the real engine. A prompt's rows are made
together when it is finished, so they do not depend on what ran beside it. The trade-off: it knows nothing of chunked
prefill or preemption, which only the real engine can test.

    DISTILL_PIPE_FAKE_STEP_SECONDS    how long a step takes (default 0); each gives every running response one token
    DISTILL_PIPE_FAKE_FAULTS          see `fake_faults`

Shapes: T tokens, R rows, L layers, H hidden size.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill_pipe.produce.captured import CapturedStep, Part
from distill_pipe.produce.engine import FinishedTrace, Request, RequestError, Response, ShardOutcome
from distill_pipe.produce.fake_faults import faults_enabled, refuse, spoil, strike
from distill_pipe.produce.fake_target import END, draw, logits_of, prefix_hashes, prefix_sum, states_of
from distill_pipe.produce.head import HeadReducer, row_uniforms
from distill_pipe.produce.sink import ShardSink
from distill_pipe.produce.step import NO_TOKEN
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import Root
from distill_pipe.store.shard import QuarantinedPrompt


@dataclass(slots=True)
class _Sequence:
    """A request being run: its tokens so far, and the `prefix_sum` of all but the last."""

    request: Request
    token_ids: list[int]
    before: int = 0


class FakeEngine:
    """See `TargetEngine` for the contract. Runs at most `max_num_seqs` prompts at a time."""

    def __init__(self, run: Run, root: Root, max_num_seqs: int) -> None:
        self._run, self._max_num_seqs = run, max_num_seqs
        self._sink = ShardSink(root, run)
        self._head = HeadReducer(run.spec.capture)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._step_seconds = float(os.environ.get("DISTILL_PIPE_FAKE_STEP_SECONDS", "0"))
        self._faults = faults_enabled()
        if root.size(FINAL_NORM) is None:
            write_final_norm(root, np.ones(run.spec.target.hidden_size, np.float32))

    def add(self, request: Request) -> None:
        tokens = list(request.token_ids_T)
        if len(tokens) > self._run.spec.engine.max_model_len:
            raise RequestError(f"{len(tokens)} tokens are more than the context length")
        if self._faults:
            refuse(tokens)
        self._waiting.append(_Sequence(request, tokens))

    def step(self) -> list[Response]:
        while self._waiting and len(self._running) < self._max_num_seqs:
            self._start(self._waiting.popleft())
        if not self._running:
            return []
        if self._step_seconds:
            time.sleep(self._step_seconds)
        ended = [(s, reason) for s in self._running if (reason := self._advance(s))]
        self._running = [s for s in self._running if all(s is not other for other, _ in ended)]
        for sequence, _ in ended:
            self._sink.add(self._captured(sequence))
        return [Response(s.request.ordinal, s.token_ids[len(s.request.token_ids_T):], reason) for s, reason in ended]

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        self._sink.finish(shard, traces)

    def commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        self._sink.commit(shard, quarantined)

    def outcomes(self) -> list[ShardOutcome]:
        return self._sink.outcomes()

    def _start(self, sequence: _Sequence) -> None:
        if self._faults:
            strike(sequence.token_ids)
        sequence.before = prefix_sum(sequence.token_ids[:-1])
        self._running.append(sequence)

    def _advance(self, sequence: _Sequence) -> str | None:
        """Write a token; returns why the response ended, once it has."""
        spec, tokens = self._run.spec, sequence.token_ids
        if spec.sampling is None:
            return "stop"
        last = (tokens[-1:], len(tokens) - 1, sequence.before)
        hash_1, sequence.before = prefix_hashes(*last), prefix_sum(*last)
        logits_V = logits_of(hash_1, spec.target.vocab_size)[0]
        tokens.append(draw(logits_V, hash_1[0], sequence.request.ordinal, spec.sampling))
        if tokens[-1] == END:
            return "stop"
        written = len(tokens) - len(sequence.request.token_ids_T)
        return "length" if written == spec.sampling.max_tokens or len(tokens) == spec.engine.max_model_len else None

    def _captured(self, sequence: _Sequence) -> CapturedStep:
        """All rows and states of a finished prompt."""
        spec, ordinal = self._run.spec, sequence.request.ordinal
        token_ids_T = np.array(sequence.token_ids, np.int64)
        given = len(sequence.request.loss_mask_T) > 0
        positions_R = np.flatnonzero(np.asarray(sequence.request.loss_mask_T, bool)[1:]) if given else np.arange(
            len(sequence.request.token_ids_T) - 1, len(token_ids_T) - 1)
        hashes_T = prefix_hashes(sequence.token_ids[:-1])
        next_R = token_ids_T[positions_R + 1]
        seed = spec.sampling.seed if spec.sampling else 0
        rows = self._head.rows(torch.from_numpy(logits_of(hashes_T[positions_R], spec.target.vocab_size)),
                               torch.from_numpy(row_uniforms(seed, ordinal, positions_R)), torch.from_numpy(next_R))
        head = [tensor.numpy() for tensor in rows.tensors()]
        if self._faults:
            spoil(sequence.token_ids, head)
        sampled_R = np.full(len(next_R), NO_TOKEN) if given else next_R
        layers = spec.capture.layers
        states = [states_of(hashes_T, layers, spec.target.hidden_size)] if layers else []
        return CapturedStep([Part(ordinal, 0, len(hashes_T), positions_R)], [*head, sampled_R], states)
