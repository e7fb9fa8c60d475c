"""Is a dataset whole and undamaged? Reads everything once.

Checks, per shard: size and sha256 of every file against the fragment, page checksums, the footer's place in the plan,
the invariants of each trace, and the sidecar's rows; over the dataset: that every prompt of the plan appears exactly
once, in `data/` or in `_quarantine/`. A deep verification also counts again what was measured when the shards were
written, decodes every hidden state, and adds up the summary.

Repairing writes what can be derived and nothing else: fragments, token tables and the summary, each from shards that
passed. A main shard, a sidecar, the plan and run.json are never touched. The price of it all is one full read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from distill_pipe.errors import DamageError, DistillPipeError, MismatchError
from distill_pipe.store.ahead import ahead
from distill_pipe.store.codec import HiddenBlob
from distill_pipe.store.commit import HIDDEN, QUARANTINE, listed_shards, require_place, shard_fragment
from distill_pipe.store.deep import is_token_table_of, require_measured
from distill_pipe.store.finalize import (
    MANIFEST,
    STATISTICS,
    SUCCESS,
    TOKENS,
    finalize,
    stale_summary,
    stored_tokens,
    summarize,
)
from distill_pipe.store.manifest import (
    FINAL_NORM,
    FileRef,
    Fragment,
    Run,
    check_file,
    checked,
    encode_record,
    fragment_name,
    read_fragment,
    require_run,
)
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import Root
from distill_pipe.store.shard import read_main, read_quarantine, read_shard_info, require_counts, traces_from_table
from distill_pipe.store.sidecar import blobs_of, check_sidecar, read_sidecar, read_sidecar_info, sidecar_info
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.statistics import token_table, token_table_name, write_token_table
from distill_pipe.store.trace import Trace

# Each holds a whole shard, hidden states included.
VERIFIERS = 4
CheckStates = Callable[[Mapping[int, HiddenBlob], HiddenCodec, int], None]


class Report(Struct, frozen=True, kw_only=True):
    """What `verify` found. `problems` names file and cause; `missing_prompts` counts ordinals found nowhere; `repaired`
    names files that were written anew."""

    root: str
    shards: int
    shards_found: int
    prompts: int
    traces: int
    quarantined: int
    rows: int
    tokens: int
    missing_prompts: int
    doubled_prompts: int
    orphans: tuple[str, ...]
    repaired: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.problems and self.missing_prompts == 0 and self.doubled_prompts == 0


@dataclass(frozen=True, slots=True)
class _Checks:
    """What is done beyond reading, and the names of what was written."""

    root: Root
    run: Run
    deep: bool
    repair: bool
    check_states: CheckStates | None
    repaired: list[str] = field(default_factory=list)


def verify(root: Root, *, deep: bool = False, repair: bool = False, check_states: CheckStates | None = None) -> Report:
    """Read the whole dataset and report.

    Args:
        deep: count again what the records say was measured.
        repair: write fragments, token tables and summary files anew where they are missing or wrong.
        check_states: called with the blobs of each trace, the codec and the hidden size, to raise DamageError where
            they do not decode; see `hidden_codec.require_finite`.

    Raises:
        MismatchError: there is no dataset, or it is of another format version.
    """
    run = require_run(root)
    checks = _Checks(root, run, deep, repair, check_states)
    found, strangers = listed_shards(root)
    seen: dict[int, int] = {}
    problems = list(_root_problems(root, run))
    problems += [f"{root}/{name} is not a shard of this dataset, yet lies where its readers look" for name in strangers]
    totals = [0, 0, 0, 0]
    referenced: set[str] = set()
    for verified in ahead(lambda shard: _verified(checks, shard), sorted(found), VERIFIERS):
        if isinstance(verified, str):
            problems.append(verified)
            continue
        fragment, traced, given_up = verified
        for ordinal in traced + given_up:
            seen[ordinal] = seen.get(ordinal, 0) + 1
        info = fragment.info
        totals = [a + b for a, b in zip(totals, (len(traced), len(given_up), info.rows, info.tokens), strict=True)]
        referenced |= {ref.name for ref in (info.hidden, info.quarantine) if ref is not None}
    if (deep or repair) and not problems and set(found) == set(range(num_shards(run))):
        problems += _summary_problems(checks)
    orphans = tuple(n for folder in (HIDDEN, QUARANTINE) for n in root.names(folder) if n not in referenced)
    prompts = run.spec.corpus.prompts
    return Report(root=str(root), shards=num_shards(run), shards_found=len(found), prompts=prompts, traces=totals[0],
                  quarantined=totals[1], rows=totals[2], tokens=totals[3],
                  missing_prompts=sum(o not in seen for o in range(prompts)),
                  doubled_prompts=sum(n > 1 for n in seen.values()), orphans=orphans,
                  repaired=tuple(sorted(checks.repaired)), problems=tuple(problems))


def _root_problems(root: Root, run: Run) -> Iterator[str]:
    """What is wrong with the files that belong to no shard: the plan, and the final norm where it was stored."""
    for ref in run.plan:
        try:
            check_file(root, ref)
        except DistillPipeError as error:
            yield str(error)
    if root.size(FINAL_NORM) is None:
        return
    try:
        read_final_norm(root, run.spec.target.hidden_size)
    except DistillPipeError as error:
        yield str(error)


def _verified(checks: _Checks, shard: int) -> tuple[Fragment, list[int], list[int]] | str:
    """What `_verify_shard` returns, or what is wrong with the shard."""
    try:
        return _verify_shard(checks, shard)
    except (DistillPipeError, OSError) as error:
        return str(error)


def _verify_shard(checks: _Checks, shard: int) -> tuple[Fragment, list[int], list[int]]:
    root, run = checks.root, checks.run
    if shard >= num_shards(run):
        raise MismatchError(f"shard {shard} is not in the plan, which ends at shard {num_shards(run) - 1}")
    fragment = shard_fragment(root, run, shard)
    with checked(root, fragment.file) as path:
        fragment = _with_own_record(checks, path, fragment)
        traces = list(traces_from_table(read_main(path, fragment.info, run.spec.capture), run.spec.target.vocab_size))
        _require_recorded(path, fragment, run, traces)
        if checks.deep:
            require_measured(path, fragment.info.measured, traces)
    if fragment.info.hidden is not None:
        _verify_sidecar(checks, fragment, fragment.info.hidden, traces)
    traced = [trace.ordinal for trace in traces]
    given_up: list[int] = []
    if fragment.info.quarantine is not None:
        with checked(root, fragment.info.quarantine) as path:
            given_up = [p.ordinal for p in read_quarantine(path, fragment.info.quarantined)]
    if sorted(traced + given_up) != list(range(*shard_range(run, shard))):
        raise MismatchError(f"{root}/{fragment.file.name}: its traces and quarantined prompts are not exactly those of "
                            "its plan")
    if checks.deep or checks.repair:
        _check_derived(checks, fragment, traces)
    return fragment, traced, given_up


def _with_own_record(checks: _Checks, path: Path, fragment: Fragment) -> Fragment:
    """The fragment, if it repeats the record in the shard; when repairing, with that record put in. The shard is the
    one that the fragment names by its hash, so it is right."""
    info = read_shard_info(path)
    if info == fragment.info:
        return fragment
    if not checks.repair:
        raise MismatchError(f"{path}: its footer and its fragment disagree")
    require_place(path, info, checks.run, fragment.info.shard)
    return replace(fragment, info=info)


def _check_derived(checks: _Checks, fragment: Fragment, traces: list[Trace]) -> None:
    """The fragment and token table of a shard that is whole: put back, or reported where only that was asked for."""
    root, vocab_size, name = checks.root, checks.run.spec.target.vocab_size, fragment_name(fragment.info.shard)
    if checks.repair and read_fragment(root, fragment.info.shard) != fragment:
        root.publish_bytes(encode_record(fragment), name)
        checks.repaired.append(name)
    tokens = token_table_name(name)
    stored = stored_tokens(root, checks.run, fragment)
    if stored is not None and is_token_table_of(stored, traces, vocab_size):
        return
    if checks.repair:
        with root.scratch() as folder:
            write_token_table(folder / "tokens", token_table(traces, vocab_size))
            root.publish(folder / "tokens", tokens)
        checks.repaired.append(tokens)
    elif root.size(tokens) is not None:
        raise DamageError(f"{root}/{tokens} is not the token table of its shard; verify --repair makes it again")


def _summary_problems(checks: _Checks) -> list[str]:
    """What is wrong with the summary of a complete dataset, if it has one; nothing where it was repaired."""
    root = checks.root
    if all(root.size(name) is None for name in (TOKENS, MANIFEST, STATISTICS, SUCCESS)):
        return []
    stale = stale_summary(root, checks.run, summarize(root, checks.run))
    if stale and checks.repair:
        finalize(root)
        checks.repaired.extend(stale)
        return []
    return [f"{root}/{name} is not what the shards add up to; finalize makes it again" for name in stale
            if root.size(name) is not None]


def _require_recorded(path: Path, fragment: Fragment, run: Run, traces: list[Trace]) -> None:
    """What the record says must be what the shard holds; and no head may repeat a token."""
    info = fragment.info
    require_counts(path, info, traces)
    if (info.hidden is not None) != bool(run.spec.capture.layers and traces):
        raise DamageError(f"{path}: its record {'has' if info.hidden else 'lacks'} a hidden-state sidecar")
    for trace in traces:
        row_N = np.repeat(np.arange(trace.num_rows), trace.topk_counts_R)
        if len(np.unique(row_N * run.spec.target.vocab_size + trace.topk_ids_N)) < len(row_N):
            raise DamageError(f"{path}: prompt {trace.ordinal}: a head holds a token twice")


def _verify_sidecar(checks: _Checks, fragment: Fragment, ref: FileRef, traces: list[Trace]) -> None:
    with checked(checks.root, ref) as path:
        info = read_sidecar_info(path)
        if info != sidecar_info(checks.run, fragment.info.shard):
            raise MismatchError(f"{path} does not hold what its run captures of shard {fragment.info.shard}")
        table = read_sidecar(path, info, info.layers, fragment.info.traces, fragment.info.tokens)
    try:
        check_sidecar(table, info, traces)
        if checks.check_states is not None:
            for i in range(len(traces)):
                checks.check_states(blobs_of(table, info, i), info.codec, info.hidden_size)
    except DamageError as error:
        raise DamageError(f"{checks.root}/{ref.name}: {error}") from None
