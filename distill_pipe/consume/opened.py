"""The shards of a dataset, opened for reading and held against their records.

Always checked: the run's fingerprint, sizes, page checksums, the invariants of a trace, and that main shard and sidecar
hold the same traces. The sha256 of a file is checked the first time that a process opens it. Whatever is wrong becomes
a `DamageError` that names the file.

The trade-off: all wanted layers of a shard are unpacked (not decoded) when its first trace is needed, because Parquet
compresses the blobs of a row group together. In return every file is read once, front to back.

Shapes: N traces of a shard.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.consume.order import Contents
from distill_pipe.consume.tokens import TOKENS_SCHEMA, token_traces
from distill_pipe.errors import CaptureError, DamageError, MismatchError, UsageError
from distill_pipe.store.manifest import FileRef, Fragment, Run, ShardInfo, read_fragment, shard_name
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.root import Root, sha256_of
from distill_pipe.store.shard import (
    MAIN_SCHEMA,
    read_main,
    read_shard_info,
    require_counts,
    require_lengths,
    traces_from_table,
)
from distill_pipe.store.sidecar import (
    EncodedTrace,
    SidecarInfo,
    blobs_of,
    check_sidecar,
    read_sidecar,
    read_sidecar_info,
    require_same_traces,
    sidecar_info,
)
from distill_pipe.store.trace import Trace

_CONTENTS: Final = pa.schema([MAIN_SCHEMA.field(name) for name in ("ordinal", "loss_mask")])
_LOOKUPS_AT_ONCE: Final = 16
# Files whose hash was right when this process opened them first, by dataset and hash.
_HASHED: Final[set[tuple[str, str]]] = set()


@dataclass(frozen=True, slots=True, eq=False)
class OpenedShard:
    """The traces of a shard, whose hidden states stay coded until they are asked for: those of a whole shard can be
    gigabytes. `hidden` is the sidecar with the wanted layers, or None when no layer is wanted."""

    traces: list[Trace]
    hidden: pa.Table | None
    info: SidecarInfo
    name: str

    def encoded(self, row: int) -> EncodedTrace:
        """One trace with the blobs of the wanted layers.

        Raises:
            DamageError: a blob is not its trace's, or holds what is not finite.
        """
        trace = self.traces[row]
        if self.hidden is None:
            return EncodedTrace(trace)
        part = self.hidden.slice(row, 1)
        with _naming(self.name):
            check_sidecar(part, self.info, [trace])
        return EncodedTrace(trace, blobs_of(part, self.info, 0))


class ShardFiles:
    """Opens the shards of one dataset.

    Args:
        layers: the layers whose hidden states are wanted; no others are read.
        check_hashes: whether the sha256 of a file is checked when this process opens it first.
        target: whether the rows are wanted; without them, traces have tokens alone (`tokens`).
    """

    def __init__(self, root: Root, run: Run, layers: Sequence[int], check_hashes: bool, target: bool = True) -> None:
        self._root, self._run, self._layers, self._check_hashes = root, run, tuple(layers), check_hashes
        self._target = target
        self._contents: dict[int, Contents] = {}
        self._damaged: dict[int, str] = {}
        self._sound: set[int] = set()

    def ordinals(self, shard: int) -> NDArray[np.int64]:
        """The ordinals of a shard's traces, in order. Where no prompt was given up on, its record says them.

        Raises:
            DamageError: neither record nor main shard can be read.
        """
        if shard in self._contents:
            return self._contents[shard].ordinals_N
        recorded_N = _recorded_ordinals(self._fragment(shard))
        return self._read_contents(shard).ordinals_N if recorded_N is None else recorded_N

    def all_ordinals(self, shards: Sequence[int]) -> list[NDArray[np.int64]]:
        """`ordinals` of many shards, several at once: in an object store each is a request."""
        with ThreadPoolExecutor(_LOOKUPS_AT_ONCE) as pool:
            return list(pool.map(self.ordinals, shards))

    def look_up(self, shards: Sequence[int]) -> None:
        """Have the `contents` of these shards at hand. What is wrong with one is raised in its turn."""
        def quietly(shard: int) -> None:
            with suppress(DamageError):
                self.contents(shard)

        unknown = [shard for shard in shards if shard not in self._contents]
        if len(unknown) > 1:
            with ThreadPoolExecutor(_LOOKUPS_AT_ONCE) as pool:
                list(pool.map(quietly, unknown))

    def contents(self, shard: int) -> Contents:
        """Which traces a shard holds, and how long they are: from its record, or else from two small columns.
        Remembered, at 16 bytes a trace.

        Raises:
            DamageError: the main shard had to be read, and is missing or damaged.
        """
        if shard not in self._contents:
            fragment = self._fragment(shard)
            ordinals_N = _recorded_ordinals(fragment)
            found = None
            if fragment is not None and ordinals_N is not None and fragment.info.lengths is not None:
                found = Contents(ordinals_N, np.array(fragment.info.lengths, np.int64))
            if found is None or len(found.tokens_N) != len(found.ordinals_N):
                found = self._read_contents(shard)
            self._contents[shard] = found
        return self._contents[shard]

    def open(self, shard: int) -> OpenedShard:
        """All of a shard that is wanted.

        Raises:
            DamageError: main shard or sidecar is missing, damaged, or of another run.
        """
        with self._main(shard) as (path, info, ref):
            self._check_hash(path, ref)
            traces = self._traces(path, info)
            if self._layers and traces and info.hidden is None:
                raise DamageError(f"{path}: its record lacks the hidden-state sidecar")
        hidden = None
        if self._layers and traces and info.hidden is not None:
            hidden = self._sidecar(shard, info, info.hidden, [t.ordinal for t in traces])
        name = info.hidden.name if info.hidden is not None else shard_name(shard)
        return OpenedShard(traces, hidden, sidecar_info(self._run, shard), f"{self._root}/{name}")

    def checked(self, shard: int) -> Contents:
        """`contents`, once the shard was read as a whole, as an epoch would, and nothing is wrong with it.

        Raises:
            DamageError: something is; again at every call, without another look.
        """
        if shard in self._damaged:
            raise DamageError(self._damaged[shard])
        if shard not in self._sound:
            try:
                opened = self.open(shard)
                for row in range(len(opened.traces)):
                    opened.encoded(row)
                self.contents(shard)
            except DamageError as error:
                self._damaged[shard] = str(error)
                raise
            self._sound.add(shard)
        return self.contents(shard)

    def _traces(self, path: Path, info: ShardInfo) -> list[Trace]:
        vocab_size = self._run.spec.target.vocab_size
        if not self._target:
            most = Limit(max(info.tokens, info.traces))
            table = read_table(path, TOKENS_SCHEMA, dict.fromkeys(TOKENS_SCHEMA.names, most))
            tokens = list(token_traces(table, vocab_size))
            require_lengths(path, info, tokens)
            return list(tokens)
        traces = list(traces_from_table(read_main(path, info, self._run.spec.capture), vocab_size))
        require_counts(path, info, traces)
        return traces

    def _read_contents(self, shard: int) -> Contents:
        with self._main(shard) as (path, info, _):
            limits = {"ordinal": Limit(info.traces), "loss_mask": Limit(max(info.tokens, info.traces))}
            table = read_table(path, _CONTENTS, limits)
        masks = table["loss_mask"].combine_chunks()
        return Contents(table["ordinal"].to_numpy(), np.diff(masks.offsets.to_numpy()).astype(np.int64))

    def _sidecar(self, shard: int, info: ShardInfo, ref: FileRef, ordinals: Sequence[int]) -> pa.Table:
        with _naming(f"{self._root}/{ref.name}"), self._root.fetched(ref.name, ref.size) as path:
            _require_size(path, ref.size)
            self._check_hash(path, ref)
            sidecar = read_sidecar_info(path)
            if sidecar != sidecar_info(self._run, shard):
                raise DamageError(f"{path} does not hold what this run captures of shard {shard}")
            hidden = read_sidecar(path, sidecar, self._layers, info.traces, info.tokens)
            require_same_traces(hidden, ordinals)
        return hidden

    @contextmanager
    def _main(self, shard: int) -> Iterator[tuple[Path, ShardInfo, FileRef | None]]:
        """The main shard with its record: from the fragment, which also knows size and hash, or from the footer."""
        name, fragment = shard_name(shard), self._fragment(shard)
        size = None if fragment is None else fragment.file.size
        with _naming(f"{self._root}/{name}"), self._root.fetched(name, size) as path:
            if fragment is not None:
                _require_size(path, fragment.file.size)
                yield path, fragment.info, fragment.file
                return
            info = read_shard_info(path)
            if (info.fingerprint, info.shard) != (self._run.fingerprint, shard):
                raise DamageError(f"{path} belongs to another run or another shard")
            yield path, info, None

    def _fragment(self, shard: int) -> Fragment | None:
        """The shard's fragment, or None where there is none or it is not this shard's."""
        fragment = read_fragment(self._root, shard)
        if fragment is None or (fragment.info.fingerprint, fragment.info.shard, fragment.file.name) != (
                self._run.fingerprint, shard, shard_name(shard)):
            return None
        return fragment

    def _check_hash(self, path: Path, ref: FileRef | None) -> None:
        if ref is None or not self._check_hashes or (str(self._root), ref.sha256) in _HASHED:
            return
        if sha256_of(path) != ref.sha256:
            raise DamageError(f"{path} has changed: its sha256 is not the one recorded")
        _HASHED.add((str(self._root), ref.sha256))


def require_layers(root: Root, run: Run, wanted: Sequence[int]) -> tuple[int, ...]:
    """The wanted layers, each once.

    Raises:
        UsageError: one is not stored.
    """
    stored = run.spec.capture.layers
    absent = sorted(set(wanted) - set(stored))
    if absent:
        raise UsageError(f"{root} does not store layers {absent}; it stores {list(stored)}")
    return tuple(dict.fromkeys(wanted))


def _recorded_ordinals(fragment: Fragment | None) -> NDArray[np.int64] | None:
    """The ordinals that follow from a record, if any: all of its range."""
    if fragment is None or fragment.info.traces != fragment.info.num_prompts:
        return None
    first = fragment.info.first_ordinal
    return np.arange(first, first + fragment.info.num_prompts)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever is wrong inside is damage of this file."""
    try:
        yield
    except (CaptureError, DamageError, MismatchError, OSError) as error:
        if name in str(error) and isinstance(error, DamageError):
            raise
        raise DamageError(f"{name}: {error}") from error


def _require_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise DamageError(f"{path} is missing" if found is None else f"{path} has {found} bytes, expected {size}")
