"""How far is a run? One listing and some fragments; needs no Ray, no GPU and no engine.

What is counted per shard (traces, tokens, bytes) is read from the fragments: of all shards where they are few, else of
some, evenly spread, and scaled up. The price of an answer in seconds at any size is that those counts are estimates
then; `shards_counted` says so. How many shards are done never is one.

Shapes: S shards that were counted.
"""

import numpy as np
from msgspec import Struct

from distill_pipe.store.ahead import ahead
from distill_pipe.store.commit import DATA, shard_of
from distill_pipe.store.manifest import Fragment, read_fragment, require_run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.quarantine import count_by_blame
from distill_pipe.store.root import Root

COUNTED = 512


class Status(Struct, frozen=True, kw_only=True):
    """Progress of a run. `eta_seconds` comes from commit times, and is None until two shards are there. Counts of
    prompts and bytes are of `shards_counted` shards, scaled to `shards_done`."""

    root: str
    target: str
    fingerprint: str
    shards: int
    shards_done: int
    shards_counted: int
    prompts: int
    traces: int
    quarantined: int
    quarantined_by_blame: dict[str, int]
    tokens: int
    rows: int
    bytes: int
    tail_mass_mean: float | None
    eta_seconds: float | None

    @property
    def complete(self) -> bool:
        return self.shards_done == self.shards


def status(root: Root) -> Status:
    """Progress from what is committed.

    Raises:
        MismatchError: there is no dataset, or it is of another format version.
    """
    run = require_run(root)
    committed = {shard: entry.modified for entry in root.entries(DATA) if (shard := shard_of(entry.name)) is not None}
    done, left = len(committed), num_shards(run) - len(committed)
    fragments = _some_fragments(root, sorted(committed))
    infos = [f.info for f in fragments]
    rows = sum(i.rows for i in infos)
    mass = sum(i.measured.tail_mass_mean * i.rows for i in infos)
    size = sum(f.file.size + sum(r.size for r in (f.info.hidden, f.info.quarantine) if r) for f in fragments)
    times, eta = committed.values(), None
    if done > 1 and left > 0:
        eta = left * (max(times) - min(times)) / (done - 1)

    def scaled(count: int) -> int:
        # Exact for every shard counted: integers.
        return count * done // len(fragments) if fragments else 0

    return Status(root=str(root), target=run.spec.target.name, fingerprint=run.fingerprint, shards=num_shards(run),
                  shards_done=done, shards_counted=len(fragments), prompts=run.spec.corpus.prompts,
                  traces=scaled(sum(i.traces for i in infos)), quarantined=scaled(sum(i.quarantined for i in infos)),
                  quarantined_by_blame={b: scaled(n) for b, n in sorted(count_by_blame(root, infos).items())},
                  tokens=scaled(sum(i.tokens for i in infos)), rows=scaled(rows), bytes=scaled(size),
                  tail_mass_mean=mass / rows if rows else None, eta_seconds=eta)


def _some_fragments(root: Root, shards: list[int]) -> list[Fragment]:
    """The fragments of at most `COUNTED` shards at equal distances; those that cannot be read are left out."""
    picked_S = np.linspace(0, len(shards) - 1, min(COUNTED, len(shards)), dtype=np.int64)
    found = ahead(lambda i: read_fragment(root, shards[i]), picked_S)
    return [fragment for fragment in found if fragment is not None]
