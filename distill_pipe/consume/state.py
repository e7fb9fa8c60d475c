"""Where a reader stands, as a small record that can be saved with a checkpoint and loaded at another number of ranks.

A state belongs to one dataset and one selection of it. It carries the list of shards it was made with, so that an epoch
goes on over the same shards while the dataset grows. The trade-off: it names the batches of the running round, some
bytes for each, instead of one number that only a reader of the same layout could go on from.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct

from distill_pipe.consume.order import Cursor, Selection
from distill_pipe.errors import MismatchError

STATE_VERSION = 1


class State(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`shards` are the shard numbers of the epoch as ranges `[first, stop)`, `skipped` those of them that were found
    damaged so far and left out. `ahead` is set in a DataLoader's worker only: steps of other workers that come before
    this one's next."""

    version: int = STATE_VERSION
    fingerprint: str
    selection: Selection
    epoch: int
    shards: tuple[tuple[int, int], ...]
    cursor: Cursor
    skipped: tuple[int, ...] = ()
    ahead: int | None = None


def decode_state(data: dict[str, object], fingerprint: str, selection: Selection) -> State:
    """A state that was saved as a dictionary of plain values.

    Raises:
        MismatchError: it is none of ours, or was saved for another dataset or another selection.
    """
    try:
        state = msgspec.convert(data, State, strict=False)
    except msgspec.ValidationError as error:
        raise MismatchError(f"this is no reader's state: {error}") from error
    if state.version != STATE_VERSION:
        raise MismatchError(f"the state has version {state.version}; this distill-pipe reads version {STATE_VERSION}")
    if state.fingerprint != fingerprint:
        raise MismatchError(f"the state was saved for another dataset, of fingerprint {state.fingerprint[:12]}; this "
                            f"one has {fingerprint[:12]}")
    saved, given = msgspec.to_builtins(state.selection), msgspec.to_builtins(selection)
    differences = [f"{name}: saved {saved[name]}, given {given[name]}" for name in saved if saved[name] != given[name]]
    if differences:
        raise MismatchError("the state was saved with other settings, which make other batches:\n  "
                            + "\n  ".join(differences))
    return state


def as_ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as ranges `[first, stop)`."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


def from_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The numbers again."""
    return tuple(number for first, stop in ranges for number in range(first, stop))
