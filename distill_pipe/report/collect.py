"""A dataset -> what the page shows.

Counts, histograms and times come from the fragments, one small file per shard. Column sizes, quarantine reasons and the
traces are read from the files themselves: from all of them while there are few, else from an even spread. The
trade-off: commit times are those of the fragment files, so a dataset that was copied shows when it was copied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distill_pipe.report.facts import Bar, ColumnBytes, Distribution, Reason, Report, Step, ViewedTrace
from distill_pipe.report.viewed import viewed_trace
from distill_pipe.store.ahead import ahead
from distill_pipe.store.column_sizes import column_sizes
from distill_pipe.store.commit import DATA, committed_shards, shard_fragment
from distill_pipe.store.finalize import stored_tokens
from distill_pipe.store.manifest import Fragment, Run, require_run
from distill_pipe.store.root import Root
from distill_pipe.store.shard import read_main, read_quarantine, traces_from_table
from distill_pipe.store.statistics import (
    Histogram,
    ShardStatistics,
    VocabularyCoverage,
    coverage,
    merge,
    merge_token_tables,
)

# An even spread of this many shards says what all of them cost, and is read in seconds.
MOST_SHARDS_READ = 64
MOST_STEPS = 60
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Commit:
    """When a shard was committed, in seconds since some moment, and what it holds."""

    time: float
    tokens: int
    prompts: int
    quarantined: int


def collect(root: Root, decode: Callable[[int], str], traces: int = 6) -> Report:
    """Everything on the page, with `traces` sample traces whose tokens `decode` turns into text.

    Raises:
        MismatchError: there is no dataset, or a shard is not of this run.
        DamageError: a shard that is read cannot be.
    """
    run = require_run(root)
    fragments = list(ahead(lambda shard: shard_fragment(root, run, shard), sorted(committed_shards(root))))
    written = {entry.name: entry.modified for entry in root.entries(DATA)}
    infos = [f.info for f in fragments]
    rows = sum(i.rows for i in infos)
    opened = spread(fragments, MOST_SHARDS_READ)
    viewed = tuple(_sample_traces(root, run, fragments, traces))
    return Report(
        target=run.spec.target.name, fingerprint=run.fingerprint, run=_run_facts(run), shards=run.spec.num_shards,
        shards_done=len(fragments), sampled_shards=len(opened), prompts=run.spec.corpus.prompts,
        traces=sum(i.traces for i in infos), quarantined=sum(i.quarantined for i in infos),
        tokens=sum(i.tokens for i in infos), rows=rows, bytes=sum(map(_bytes, fragments)),
        tail_mass_mean=sum(i.measured.tail_mass_mean * i.rows for i in infos) / max(rows, 1),
        steps=throughput([_commit(f, written) for f in fragments]),
        distributions=_distributions(merge(i.measured.statistics for i in infos)),
        columns=_columns(root, opened, fragments), vocab_size=run.spec.target.vocab_size,
        coverage=_coverage(root, run, fragments), reasons=_reasons(root, opened), viewed=viewed,
        token_text=_token_text(viewed, decode))


def spread(fragments: Sequence[Fragment], most: int) -> list[Fragment]:
    """At most `most` of the shards, evenly spaced, the first and the last among them."""
    places = np.unique(np.linspace(0, len(fragments) - 1, min(most, len(fragments))).round().astype(int))
    return [fragments[i] for i in places]


def throughput(commits: Sequence[Commit]) -> tuple[Step, ...]:
    """At most MOST_STEPS stretches of time with what was committed in each. The clock starts at the first commit, whose
    own tokens took a time that nobody knows and are left out."""
    ordered = sorted(commits, key=lambda c: c.time)
    if not ordered or ordered[0].time == ordered[-1].time:
        return ()
    origin = start = ordered[0].time
    least = (ordered[-1].time - origin) / MOST_STEPS
    steps: list[Step] = []
    tokens = prompts = 0
    quarantined = ordered[0].quarantined
    for commit in ordered[1:]:
        tokens, prompts = tokens + commit.tokens, prompts + commit.prompts
        quarantined += commit.quarantined
        if commit.time - start < least and commit is not ordered[-1]:
            continue
        if steps and commit.time - start < least:
            last = steps.pop()
            start, tokens, prompts = last.start + origin, tokens + last.tokens, prompts + last.prompts
            quarantined += last.quarantined
        steps.append(Step(start=start - origin, stop=commit.time - origin, tokens=tokens, prompts=prompts,
                          quarantined=quarantined))
        start, tokens, prompts, quarantined = commit.time, 0, 0, 0
    return tuple(steps)


def _commit(fragment: Fragment, written: Mapping[str, float]) -> Commit:
    info = fragment.info
    return Commit(written[fragment.file.name], info.tokens, info.num_prompts, info.quarantined)


def _bytes(fragment: Fragment) -> int:
    info = fragment.info
    return fragment.file.size + sum(ref.size for ref in (info.hidden, info.quarantine) if ref)


def _run_facts(run: Run) -> dict[str, str]:
    spec = run.spec
    capture = spec.capture
    head = f"{capture.top_k} entries per row"
    if capture.coverage is not None:
        head = f"as many entries as hold {capture.coverage:.4g} of the probability, at most {capture.top_k}"
    facts = {
        "target": spec.target.name, "revision": spec.target.revision, "architecture": spec.target.architecture,
        "dtype": spec.target.dtype, "engine": f"{spec.engine.name} {spec.engine.version}",
        "context": f"{spec.engine.max_model_len:,} tokens",
        "corpus": ", ".join(f.name for f in spec.corpus.files) or "-",
        "responses": "written by the target" if spec.responses == "target" else "taken from the corpus",
    }
    if spec.sampling is not None:
        facts["sampling"] = (f"temperature {spec.sampling.temperature:g}, top-p {spec.sampling.top_p:g}, at most "
                             f"{spec.sampling.max_tokens:,} tokens, seed {spec.sampling.seed}")
    return facts | {
        "head": head, "tail": f"{capture.tail_samples} samples per row",
        "hidden states": f"layers {', '.join(map(str, capture.layers))}, {capture.hidden_codec}" if capture.layers
                         else "none",
        "made by": run.created_by, "started": run.created_at, "fingerprint": run.fingerprint}


def _distributions(found: ShardStatistics) -> tuple[Distribution, ...]:
    return (
        _distribution("Entropy", "nats per row: how open the target was", "rows", found.entropy),
        _distribution("Mass outside the head", "probability that only the tail samples speak for", "rows",
                      found.tail_mass),
        _distribution("Head entries", "candidates stored per row", "rows", found.top_k),
        _distribution("Trace length", "tokens, prompt and response", "traces", found.tokens))


def _distribution(title: str, note: str, counted: str, found: Histogram) -> Distribution:
    base = {"log2": 2.0, "log10": 10.0}.get(found.scale)
    marks = [found.first + found.step * i for i in range(found.bins + 1)]
    edges = [mark if base is None else base ** mark for mark in marks]
    bars = tuple(Bar(low=edges[i], high=edges[i + 1], count=count) for i, count in enumerate(found.counts))
    return Distribution(title=title, note=note, counted=counted, scale=found.scale, bars=bars)


def _columns(root: Root, opened: Sequence[Fragment], fragments: Sequence[Fragment]) -> tuple[ColumnBytes, ...]:
    """Bytes by column, the largest first; what files hold beside their columns is `footers`."""
    found: dict[str, int] = {}
    for fragment in opened:
        for ref in (fragment.file, fragment.info.hidden):
            if ref is None:
                continue
            with root.fetched(ref.name) as path:
                sizes = column_sizes(path)
            sizes["footers"] = ref.size - sum(sizes.values())
            found |= {name: found.get(name, 0) + size for name, size in sizes.items()}
    scale = sum(map(_bytes, fragments)) / max(sum(map(_bytes, opened)), 1)
    return tuple(ColumnBytes(column=name, bytes=round(size * scale))
                 for name, size in sorted(found.items(), key=lambda item: -item[1]))


def _coverage(root: Root, run: Run, fragments: Sequence[Fragment]) -> tuple[VocabularyCoverage, ...]:
    """What draft vocabularies of growing size cover, by the token tables of the shards; a table that is missing is
    left out with its rows."""
    rows = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal rows
        for fragment in fragments:
            table = stored_tokens(root, run, fragment)
            if table is not None:
                rows += fragment.info.rows
                yield table

    table = merge_token_tables(tables(), run.spec.target.vocab_size)
    if table.num_rows == 0:
        return ()
    # Half octaves: enough for a smooth line.
    sizes = sorted({min(round(2 ** (i / 2)), table.num_rows) for i in range(64)})
    return coverage(table, rows, sizes)


def _reasons(root: Root, opened: Sequence[Fragment]) -> tuple[Reason, ...]:
    counts: dict[str, int] = {}
    messages: dict[str, str] = {}
    for fragment in opened:
        if fragment.info.quarantine is None:
            continue
        with root.fetched(fragment.info.quarantine.name) as path:
            prompts = read_quarantine(path, fragment.info.quarantined)
        for prompt in prompts:
            counts[prompt.code] = counts.get(prompt.code, 0) + 1
            messages.setdefault(prompt.code, prompt.message[:_MESSAGE_CHARACTERS])
    return tuple(Reason(code=code, prompts=count, message=messages[code])
                 for code, count in sorted(counts.items(), key=lambda item: -item[1]))


def _sample_traces(root: Root, run: Run, fragments: Sequence[Fragment], traces: int) -> Iterator[ViewedTrace]:
    """Traces from an even spread of shards; of few shards, several from each."""
    chosen = spread([f for f in fragments if f.info.traces], traces)
    for i, fragment in enumerate(chosen):
        share = traces // len(chosen) + (i < traces % len(chosen))
        with root.fetched(fragment.file.name) as path:
            table = read_main(path, fragment.info, run.spec.capture)
        places = np.unique(np.linspace(0, table.num_rows - 1, min(share, table.num_rows)).round().astype(int))
        for place in places.tolist():
            trace = next(traces_from_table(table.slice(place, 1), run.spec.target.vocab_size))
            yield viewed_trace(trace, run.spec.target.vocab_size, run.spec.capture.logprob_bits)


def _token_text(viewed: Sequence[ViewedTrace], decode: Callable[[int], str]) -> dict[int, str]:
    ids: set[int] = set()
    for trace in viewed:
        for token in trace.tokens:
            ids.add(token.token_id)
            ids.update(candidate for candidate, _ in (token.row.candidates if token.row else ()))
    return {token: decode(token) for token in sorted(ids)}
