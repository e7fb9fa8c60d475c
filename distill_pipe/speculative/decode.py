"""One prompt decoded speculatively: draft a chain, verify it in one pass of the target, and go on behind what held.

The draft runs over the whole sequence again at every step, because only its later steps are cached. On one small layer
that costs about what the target's pass does, and keeps the draft the one that was trained, line for line.

Shapes: T tokens, K drafted tokens, H hidden size, V vocabulary, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.errors import UsageError
from distill_pipe.speculative.sampler import draw, probabilities, verify
from distill_pipe.speculative.target import Target


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode. `drafted` tokens per step; `stop_ids` end a text."""

    drafted: int
    temperature: float
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Decoded:
    """The tokens written, and how many drafted ones each step of the target accepted.

    A last step that ran past `max_tokens` counts as a whole, though its tokens are cut off: where a text was to end is
    no fault of the draft's, and vLLM's counters do the same. What was accepted behind a stop token does not count,
    because the target's text ends there; vLLM's counters take that in too.
    """

    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]


def decode(target: Target, draft: Draft, prompt_ids: Sequence[int], how: Decoding,
           generator: torch.Generator) -> Decoded:
    """Write a text. The first token comes from the prompt's pass; then each step accepts some and adds one.

    Raises:
        UsageError: the draft cannot draft so many tokens.
    """
    if not draft.recurrent and how.drafted > draft.positions:
        raise UsageError(f"this draft was trained for {draft.positions} positions and its kind has no weights for "
                         f"more; {how.drafted} tokens cannot be drafted")
    target.reset()
    logits_TV, hidden = target.extend(prompt_ids)
    written = [*prompt_ids, draw(probabilities(logits_TV[-1], how.temperature), generator)]
    accepted: list[int] = []
    start = len(prompt_ids)
    while len(written) - start < how.max_tokens and not how.stop_ids & set(written[start:]):
        drafted_ids, q_KV = draft_chain(draft, written, hidden, how, generator)
        logits_KV, new_hidden = target.extend([written[-1], *drafted_ids])
        held, token = verify(drafted_ids, q_KV, probabilities(logits_KV, how.temperature), generator)
        target.take_back(len(drafted_ids) - held)
        hidden = {n: torch.cat([h_TH, new_hidden[n][:held + 1]]) for n, h_TH in hidden.items()}
        written += [*drafted_ids[:held], token]
        accepted.append(_before_stop(drafted_ids[:held], how.stop_ids))
    return Decoded(_cut(written[start:], how), tuple(accepted))


@torch.inference_mode()
def draft_chain(draft: Draft, token_ids: Sequence[int], hidden: dict[int, Tensor], how: Decoding,
                generator: torch.Generator) -> tuple[list[int], Tensor]:
    """K tokens drafted behind `token_ids`, and the distributions `[K, V]` they were drawn from.

    The last token has been sampled and not been fed to the target: `hidden` holds the states of all but it.
    """
    known = len(token_ids) - 1
    chain = draft.begin(hidden, torch.arange(known), torch.tensor([0, known]))
    state_1H = chain.step(torch.tensor(token_ids[1:]))[-1:]
    chain.narrow(torch.tensor([known - 1]))
    drafted, taken = list[int](), list[Tensor]()
    for k in range(how.drafted):
        if k:
            state_1H = chain.step(torch.tensor(drafted[-1:]))
        q_V = _over_target(draft, probabilities(draft.logits(state_1H, k)[0], how.temperature))
        drafted.append(draw(q_V, generator))
        taken.append(q_V)
    return drafted, torch.stack(taken)


def _over_target(draft: Draft, q_D: Tensor) -> Tensor:
    """The draft's distribution over the target's vocabulary: nothing outside its own."""
    if draft.vocabulary is None:
        return q_D
    return torch.zeros(draft.config.vocab_size, dtype=q_D.dtype).scatter(0, draft.vocabulary.d2t_D, q_D)


def _before_stop(token_ids: list[int], stop_ids: frozenset[int]) -> int:
    """How many of the tokens belong to the text: what was drafted behind its end counts for nothing."""
    return next((i + 1 for i, token in enumerate(token_ids) if token in stop_ids), len(token_ids))


def _cut(written: list[int], how: Decoding) -> tuple[int, ...]:
    written = written[:how.max_tokens]
    return tuple(written[:_before_stop(written, how.stop_ids)])
