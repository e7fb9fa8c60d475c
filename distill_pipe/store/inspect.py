"""One trace as rows for people: what token stood there, and what the target expected next."""

import math

import numpy as np
from msgspec import Struct

from distill_pipe.errors import UsageError
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import Root
from distill_pipe.store.shard import read_main, traces_from_table
from distill_pipe.store.trace import Trace


class InspectedToken(Struct, frozen=True, kw_only=True):
    """Position t: its token, whether that token is supervised, and, where token t+1 is, the target's distribution of
    token t+1 (ids with probability, likeliest first) with the mass outside the head."""

    position: int
    token_id: int
    supervised: bool
    candidates: tuple[tuple[int, float], ...]
    tail_mass: float | None


def inspect_trace(root: Root, ordinal: int, candidates: int) -> tuple[list[InspectedToken], Run]:
    """The tokens of one trace, with at most `candidates` head entries each.

    Raises:
        UsageError: the prompt is not in the plan, its shard is not committed yet, or it was quarantined.
    """
    run = require_run(root)
    shard = ordinal // run.spec.prompts_per_shard
    if not 0 <= shard < num_shards(run) or ordinal >= run.spec.corpus.prompts:
        raise UsageError(f"trace {ordinal} is not in the plan, which has prompts 0 to {run.spec.corpus.prompts - 1}")
    if shard not in committed_shards(root):
        raise UsageError(f"trace {ordinal} is in shard {shard}, which is not committed yet")
    fragment = shard_fragment(root, run, shard)
    with root.fetched(fragment.file.name, fragment.file.size) as path:
        table = read_main(path, fragment.info, run.spec.capture)
    rows = np.flatnonzero(table["ordinal"].to_numpy() == ordinal)
    if len(rows) == 0:
        raise UsageError(f"trace {ordinal} was quarantined; see {root}/_quarantine")
    trace = next(traces_from_table(table.slice(int(rows[0]), 1)))
    return _tokens(trace, candidates), run


def _tokens(trace: Trace, candidates: int) -> list[InspectedToken]:
    ends = trace.topk_counts_R.cumsum()
    row_at = {int(t): r for r, t in enumerate(trace.positions_R)}
    tokens = []
    for position in range(trace.num_tokens):
        row = row_at.get(position)
        likely: tuple[tuple[int, float], ...] = ()
        if row is not None:
            first = int(ends[row] - trace.topk_counts_R[row])
            last = min(first + candidates, int(ends[row]))
            likely = tuple((int(trace.topk_ids_N[n]), math.exp(trace.topk_logprobs_N[n]))
                           for n in range(first, last))
        tokens.append(InspectedToken(
            position=position, token_id=int(trace.token_ids_T[position]), supervised=bool(trace.loss_mask_T[position]),
            candidates=likely, tail_mass=None if row is None else float(trace.tail_mass_R[row])))
    return tokens
