"""What the page shows. Numbers are plain, and the page puts them into words; text that came from a model stays text.

Shapes: nothing here is an array; a list of bars or tokens is what the page draws from left to right.
"""

from msgspec import Struct

from distill_pipe.store.statistics import VocabularyCoverage


class Step(Struct, frozen=True, kw_only=True):
    """What was committed between two moments, in seconds since the first commit. `tokens / (stop - start)` is the
    throughput."""

    start: float
    stop: float
    tokens: int
    prompts: int
    quarantined: int


class Bar(Struct, frozen=True, kw_only=True):
    """How many values lie in `[low, high)`."""

    low: float
    high: float
    count: int


class Distribution(Struct, frozen=True, kw_only=True):
    """A histogram of rows or traces. `scale` is `linear`, `log2` or `log10`; the bars are those of the records."""

    title: str
    note: str
    counted: str
    scale: str
    bars: tuple[Bar, ...]


class ColumnBytes(Struct, frozen=True, kw_only=True):
    """Bytes of one column in the whole dataset; scaled up from some shards when there are very many."""

    column: str
    bytes: int


class Reason(Struct, frozen=True, kw_only=True):
    """Prompts that were given up on for one reason, and the message of the first of them."""

    code: str
    prompts: int
    message: str


class ViewedRow(Struct, frozen=True, kw_only=True):
    """The target's distribution of the token that it stands beside, before that token was known.

    `entropy` is in nats, estimated from head and tail samples; `entropy_low` and `entropy_high` bound what any tail
    with the stored mass can make of it. `candidates` are pairs of token id and probability, likeliest first.
    `head_left` is the probability of the head entries that are not among them, `head_entries` how many the head has.
    """

    entropy: float
    entropy_low: float
    entropy_high: float
    tail_mass: float
    next_logprob: float
    head_entries: int
    head_left: float
    candidates: tuple[tuple[int, float], ...]


class ViewedToken(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token of a trace. It has a row where it is supervised."""

    token_id: int
    row: ViewedRow | None = None


class ViewedTrace(Struct, frozen=True, kw_only=True):
    """A trace up to its `len(tokens)`-th token of `num_tokens`."""

    ordinal: int
    prompt_id: str
    domain: str | None
    finish_reason: str
    num_tokens: int
    tokens: tuple[ViewedToken, ...]


class Report(Struct, frozen=True, kw_only=True):
    """Everything on the page. `sampled_shards` is how many shards were opened for `columns` and `reasons`; the other
    figures come from the records of all `shards_done`."""

    target: str
    fingerprint: str
    run: dict[str, str]
    shards: int
    shards_done: int
    sampled_shards: int
    prompts: int
    traces: int
    quarantined: int
    tokens: int
    rows: int
    bytes: int
    tail_mass_mean: float
    steps: tuple[Step, ...]
    distributions: tuple[Distribution, ...]
    columns: tuple[ColumnBytes, ...]
    vocab_size: int
    coverage: tuple[VocabularyCoverage, ...]
    reasons: tuple[Reason, ...]
    viewed: tuple[ViewedTrace, ...]
    token_text: dict[int, str]
