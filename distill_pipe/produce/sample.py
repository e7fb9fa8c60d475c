"""A sample of the corpus, rendered as a worker would: how many tokens and rows a run will have.

Counts are exact up to the sample. What is counted beside them is how much of each prompt repeats the one before, since
a shared template or system prompt is stored once and compressed away after that.

Shapes: P prompts of the sample.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import UsageError
from distill_pipe.produce.characters import CharacterRenderer
from distill_pipe.produce.chat import Renderer, TooLongError
from distill_pipe.produce.corpus import read_prompts
from distill_pipe.produce.job import Job
from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.store.codec import bytes_per_element
from distill_pipe.store.plan import PlannedPrompt
from distill_pipe.store.spec import RunSpec

# How far back zstd finds a repetition.
_REACH_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Totals:
    """A whole run in units; `fresh` are positions whose states are not those of the trace before."""

    shards: int
    trace: float
    token: float
    row: float
    fresh: float

    @property
    def position(self) -> float:
        return self.token - self.trace


@dataclass(slots=True)
class Sample:
    """Rendered prompts of the corpus: tokens, supervised rows of those that are given, and tokens that the prompt
    before begins with as well."""

    prompts: list[PlannedPrompt]
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def totals(self, spec: RunSpec, response: float) -> Totals:
        """The whole run, when the target writes `response` tokens where there is room."""
        room_P = spec.engine.max_model_len - np.asarray(self.tokens)
        written_P = np.minimum(response, room_P) if spec.responses == "target" else np.zeros(len(room_P))
        token_P, row_P = self.tokens + written_P, np.asarray(self.rows) + written_P
        scale = spec.corpus.prompts / len(self.prompts)
        return Totals(spec.num_shards, len(room_P) * scale, float(token_P.sum()) * scale, float(row_P.sum()) * scale,
                      fresh_positions(token_P, np.asarray(self.shared), spec.target.hidden_size) * scale)


def fresh_positions(token_P: NDArray[Any], shared_P: NDArray[Any], hidden_size: int) -> float:
    """Positions of traces that share their first tokens with the trace before, less those that compression drops."""
    position_P = token_P - 1
    if position_P.mean() * hidden_size * bytes_per_element("bf16") > _REACH_BYTES:
        return float(position_P.sum())
    return float((position_P - np.minimum(shared_P, position_P)).sum())


def shared_prefix(ids: Sequence[int], before: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))


def evenly(total: int, wanted: int) -> list[int]:
    """`wanted` numbers below `total` (or all of them) at equal distances, each in the middle of its share."""
    wanted = min(total, wanted)
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def read_sample(job: Job, spec: RunSpec, renderer: Renderer | CharacterRenderer, ordinals: Sequence[int]) -> Sample:
    """Render some prompts of the corpus as a worker would."""
    wanted, prompts = set(ordinals), read_prompts(job.corpus_files, job.responses, job.limit)
    sample = Sample([p for p in prompts if p.ordinal in wanted])
    before: list[int] = []
    for prompt in sample.prompts:
        try:
            rendered = renderer.render_fitting(prompt.messages, spec)
        except TemplateError:
            sample.faults["refused"] += 1
            continue
        except TooLongError:
            sample.faults["too_long"] += 1
            continue
        ids = rendered.token_ids_T
        sample.tokens.append(len(ids))
        sample.rows.append(sum(rendered.loss_mask_T[1:]))
        sample.shared.append(shared_prefix(ids, before))
        before = ids
    if not sample.tokens:
        raise UsageError(f"none of {len(sample.prompts)} prompts can be used: {sample.faults['too_long']} are over the "
                         f"context length of {spec.engine.max_model_len} and the chat template refuses "
                         f"{sample.faults['refused']}; raise max_model_len or choose another corpus")
    return sample
