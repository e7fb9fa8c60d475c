"""The prompts that a dataset gave up on, over all of its shards, with what they said."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import Run, ShardInfo
from distill_pipe.store.plan import PlannedPrompt, read_planned_shard
from distill_pipe.store.root import Root
from distill_pipe.store.shard import QuarantinedPrompt, read_quarantine

# Codes that speak of a failure of ours, not of the corpus.
FAILED = ("engine", "not_finite")


# Whose fault each code is, in the words of `errors.FAILURE_CLASSES`.
_BLAME = {"too_long": "data", "template": "data"} | dict.fromkeys(FAILED, "engine")


def read_given_up(root: Root, info: ShardInfo) -> list[QuarantinedPrompt]:
    """What one shard gave up on."""
    if info.quarantine is None:
        return []
    with root.fetched(info.quarantine.name, info.quarantine.size) as path:
        return read_quarantine(path, info.quarantined)


def count_by_blame(root: Root, infos: Iterable[ShardInfo]) -> dict[str, int]:
    """How many prompts these shards gave up on, by whose fault it was."""
    return Counter(_BLAME.get(p.code, "bug") for info in infos for p in read_given_up(root, info))


def quarantined_prompts(root: Root, run: Run,
                        codes: Collection[str] | None) -> Iterator[tuple[PlannedPrompt, QuarantinedPrompt]]:
    """Prompts with one of these codes (or any), in ordinal order, with the reason.

    Raises:
        DamageError, MismatchError: a file is missing or damaged.
    """
    for shard in sorted(committed_shards(root)):
        info = shard_fragment(root, run, shard).info
        if info.quarantine is None:
            continue
        given_up = {p.ordinal: p for p in read_given_up(root, info) if codes is None or p.code in codes}
        if given_up:
            yield from ((p, given_up[p.ordinal]) for p in read_planned_shard(root, run, shard) if p.ordinal in given_up)
