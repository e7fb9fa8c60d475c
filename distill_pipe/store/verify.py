"""Is a dataset whole and undamaged? Reads everything once, repairs nothing.

Checks, per shard: size and sha256 of every file against the fragment, page checksums, the footer's place in the plan,
the invariants of each trace, and the sidecar's rows; over the dataset: that every prompt of the plan appears exactly
once, in `data/` or in `_quarantine/`. The price is one full read of the dataset.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct

from distill_pipe.errors import DamageError, DistillPipeError, MismatchError
from distill_pipe.store.commit import HIDDEN, QUARANTINE, listed_shards, shard_fragment
from distill_pipe.store.manifest import FINAL_NORM, FileRef, Fragment, Run, check_file, checked, require_run
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import Root
from distill_pipe.store.shard import read_main, read_quarantine, read_shard_info, require_counts, traces_from_table
from distill_pipe.store.sidecar import check_sidecar, read_sidecar, read_sidecar_info, sidecar_info
from distill_pipe.store.trace import Trace


class Report(Struct, frozen=True, kw_only=True):
    """What `verify` found. `problems` names file and cause; `missing_prompts` counts ordinals found nowhere."""

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
    problems: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.problems and self.missing_prompts == 0 and self.doubled_prompts == 0


def verify(root: Root) -> Report:
    """Read the whole dataset and report.

    Raises:
        MismatchError: there is no dataset, or it is of another format version.
    """
    run = require_run(root)
    found, strangers = listed_shards(root)
    seen: dict[int, int] = {}
    problems = list(_root_problems(root, run))
    problems += [f"{root}/{name} is not a shard of this dataset, yet lies where its readers look" for name in strangers]
    totals = [0, 0, 0, 0]
    referenced: set[str] = set()
    for shard in sorted(found):
        try:
            fragment, traced, given_up = _verify_shard(root, run, shard)
        except (DistillPipeError, OSError) as error:
            problems.append(str(error))
            continue
        for ordinal in traced + given_up:
            seen[ordinal] = seen.get(ordinal, 0) + 1
        info = fragment.info
        totals = [a + b for a, b in zip(totals, (len(traced), len(given_up), info.rows, info.tokens), strict=True)]
        referenced |= {ref.name for ref in (info.hidden, info.quarantine) if ref is not None}
    orphans = tuple(n for folder in (HIDDEN, QUARANTINE) for n in root.names(folder) if n not in referenced)
    prompts = run.spec.corpus.prompts
    return Report(root=str(root), shards=num_shards(run), shards_found=len(found), prompts=prompts, traces=totals[0],
                  quarantined=totals[1], rows=totals[2], tokens=totals[3],
                  missing_prompts=sum(o not in seen for o in range(prompts)),
                  doubled_prompts=sum(n > 1 for n in seen.values()), orphans=orphans, problems=tuple(problems))


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


def _verify_shard(root: Root, run: Run, shard: int) -> tuple[Fragment, list[int], list[int]]:
    if shard >= num_shards(run):
        raise MismatchError(f"shard {shard} is not in the plan, which ends at shard {num_shards(run) - 1}")
    fragment = shard_fragment(root, run, shard)
    with checked(root, fragment.file) as path:
        if read_shard_info(path) != fragment.info:
            raise MismatchError(f"{path}: its footer and its fragment disagree")
        traces = list(traces_from_table(read_main(path, fragment.info, run.spec.capture), run.spec.target.vocab_size))
        _require_recorded(path, fragment, run, traces)
    if fragment.info.hidden is not None:
        _verify_sidecar(root, run, fragment, fragment.info.hidden, traces)
    traced = [trace.ordinal for trace in traces]
    given_up: list[int] = []
    if fragment.info.quarantine is not None:
        with checked(root, fragment.info.quarantine) as path:
            given_up = [p.ordinal for p in read_quarantine(path, fragment.info.quarantined)]
    if sorted(traced + given_up) != list(range(*shard_range(run, shard))):
        raise MismatchError(f"{root}/{fragment.file.name}: its traces and quarantined prompts are not exactly those of "
                            "its plan")
    return fragment, traced, given_up


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


def _verify_sidecar(root: Root, run: Run, fragment: Fragment, ref: FileRef, traces: list[Trace]) -> None:
    with checked(root, ref) as path:
        info = read_sidecar_info(path)
        if info != sidecar_info(run, fragment.info.shard):
            raise MismatchError(f"{path} does not hold what its run captures of shard {fragment.info.shard}")
        table = read_sidecar(path, info, info.layers, fragment.info.traces, fragment.info.tokens)
    try:
        check_sidecar(table, info, traces)
    except DamageError as error:
        raise DamageError(f"{root}/{ref.name}: {error}") from None
