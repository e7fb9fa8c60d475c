"""How far is a run? One listing and the fragments; needs no Ray, no GPU and no engine."""

from msgspec import Struct

from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import fragment_name, read_fragment, require_run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import LocalRoot


class Status(Struct, frozen=True, kw_only=True):
    """Progress of a run. `eta_seconds` comes from commit times, and is None until two shards are there."""

    root: str
    target: str
    fingerprint: str
    shards: int
    shards_done: int
    prompts: int
    traces: int
    quarantined: int
    tokens: int
    rows: int
    bytes: int
    tail_mass_mean: float | None
    eta_seconds: float | None

    @property
    def complete(self) -> bool:
        return self.shards_done == self.shards


def status(root: LocalRoot) -> Status:
    """Progress from what is committed.

    Raises:
        MismatchError: there is no dataset, or it is of another format version.
    """
    run = require_run(root)
    done = committed_shards(root)
    fragments = [f for shard in done if (f := read_fragment(root, shard)) is not None]
    infos = [f.info for f in fragments]
    rows = sum(i.rows for i in infos)
    mass = sum(i.measured.tail_mass_mean * i.rows for i in infos)
    times = sorted(root.local(fragment_name(f.info.shard)).stat().st_mtime for f in fragments)
    eta = None
    if len(times) > 1 and len(done) < num_shards(run):
        eta = (num_shards(run) - len(done)) * (times[-1] - times[0]) / (len(times) - 1)
    return Status(root=str(root), target=run.spec.target.name, fingerprint=run.fingerprint, shards=num_shards(run),
                  shards_done=len(done), prompts=run.spec.corpus.prompts, traces=sum(i.traces for i in infos),
                  quarantined=sum(i.quarantined for i in infos), tokens=sum(i.tokens for i in infos), rows=rows,
                  bytes=sum(f.file.size + sum(r.size for r in (f.info.hidden, f.info.quarantine) if r)
                            for f in fragments),
                  tail_mass_mean=mass / rows if rows else None, eta_seconds=eta)
