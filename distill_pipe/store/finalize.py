"""The last step of a run: what all shards add up to, in a few files for people and for whoever chooses a vocabulary.

    statistics/tokens.parquet    token table of the dataset
    manifest.parquet             one row per shard: files, hashes, counts
    statistics.json              totals, histograms, coverage of draft vocabularies, rounding and codec errors
    _SUCCESS                     the fingerprint; written last

All of it is derived: readers of the data need none of these files, and running again writes the same bytes. Shards are
added up one by one while the next are read, so memory holds the vocabulary and one manifest row per shard. The
trade-off: a token table that is missing or cannot be true is made again from its main shard, a full read of it.

Shapes: S shards, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from distill_pipe.errors import CaptureError, DamageError, MismatchError
from distill_pipe.store.ahead import ahead
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import (
    FileRef,
    Fragment,
    HiddenError,
    Run,
    decode_record,
    encode_record,
    fragment_name,
    require_run,
)
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.parquet_writer import METADATA_KEY, write_table
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import Root, sha256_of
from distill_pipe.store.shard import read_main, traces_from_table
from distill_pipe.store.spec import FORMAT_VERSION, Sha256
from distill_pipe.store.statistics import (
    TOKEN_SCHEMA,
    ShardStatistics,
    VocabularyCoverage,
    coverage,
    merge,
    merge_token_tables,
    token_table,
    token_table_name,
    write_token_table,
)

TOKENS, MANIFEST, STATISTICS, SUCCESS = "statistics/tokens.parquet", "manifest.parquet", "statistics.json", "_SUCCESS"
MANIFEST_SCHEMA = pa.schema([
    ("shard", pa.int64()), ("name", pa.string()), ("sha256", pa.string()), ("size", pa.int64()),
    ("hidden_name", pa.string()), ("hidden_sha256", pa.string()), ("hidden_size", pa.int64()),
    ("quarantine_name", pa.string()), ("quarantine_sha256", pa.string()), ("quarantine_size", pa.int64()),
    ("first_ordinal", pa.int64()), ("num_prompts", pa.int64()), ("traces", pa.int64()), ("tokens", pa.int64()),
    ("rows", pa.int64()), ("quarantined", pa.int64()),
    ("head_tv_error_max", pa.float64()), ("head_tv_error_mean", pa.float64()), ("tail_mass_mean", pa.float64()),
])
_COUNTS = ("first_ordinal", "num_prompts", "traces", "tokens", "rows", "quarantined")
_ADDED = ("size", "hidden_size", "quarantine_size", *_COUNTS[1:])
_MEASURED = ("head_tv_error_max", "head_tv_error_mean", "tail_mass_mean")


class DatasetStatistics(Struct, frozen=True, kw_only=True):
    """statistics.json. `bytes` counts main shards, sidecars and quarantine files; `head_tv_error_*`, `tail_mass_mean`
    and `hidden` are over all rows that were measured."""

    format_version: int = FORMAT_VERSION
    fingerprint: Sha256
    shards: int
    prompts: int
    traces: int
    quarantined: int
    tokens: int
    rows: int
    bytes: int
    head_tv_error_max: float
    head_tv_error_mean: float
    tail_mass_mean: float
    hidden: tuple[HiddenError, ...]
    coverage: tuple[VocabularyCoverage, ...]
    statistics: ShardStatistics


class Success(Struct, frozen=True, kw_only=True):
    """_SUCCESS: the dataset of this fingerprint was complete, and its summary is there."""

    format_version: int = FORMAT_VERSION
    fingerprint: Sha256


class Final(Struct, frozen=True, kw_only=True):
    """What `finalize` wrote. `recounted` is the number of shards whose token table had to be made again."""

    root: str
    files: tuple[FileRef, ...]
    recounted: int
    statistics: DatasetStatistics


@dataclass(frozen=True, slots=True)
class Summary:
    """What the shards add up to: token table, manifest and record. `recounted` as in `Final`."""

    tokens: pa.Table
    manifest: pa.Table
    statistics: DatasetStatistics
    recounted: int


def finalize(root: Root) -> Final:
    """Sum up a complete dataset and write the summary.

    Raises:
        DamageError: shards are missing, or a main shard whose tokens must be counted again cannot be read.
        MismatchError: there is no dataset, a shard is not of this run, or one is of another format version.
    """
    run = require_run(root)
    missing = set(range(num_shards(run))) - committed_shards(root)
    if missing:
        raise DamageError(f"{root} is not complete: {len(missing)} of {num_shards(run)} shards are missing; run "
                          "generate again to make them")
    summary = summarize(root, run)
    success = Success(fingerprint=run.fingerprint)
    key = {METADATA_KEY: msgspec.json.encode(success, order="deterministic")}
    with root.scratch() as folder:
        write_token_table(folder / "tokens", summary.tokens.replace_schema_metadata(key))
        write_table(folder / "manifest", summary.manifest.replace_schema_metadata(key))
        (folder / "statistics").write_bytes(encode_record(summary.statistics))
        (folder / "success").write_bytes(encode_record(success))
        files = [_publish(root, folder / part, name) for part, name in (
            ("tokens", TOKENS), ("manifest", MANIFEST), ("statistics", STATISTICS), ("success", SUCCESS))]
    return Final(root=str(root), files=tuple(files), recounted=summary.recounted, statistics=summary.statistics)


def summarize(root: Root, run: Run) -> Summary:
    """What a complete dataset adds up to. Raises as `finalize`."""
    sums = _Sums(run)
    shards = ahead(lambda shard: _counted_shard(root, run, shard), range(num_shards(run)))
    tokens = merge_token_tables((sums.add(*shard) for shard in shards), run.spec.target.vocab_size)
    manifest = pa.Table.from_pylist(sums.manifest, MANIFEST_SCHEMA)
    return Summary(tokens, manifest, sums.statistics(manifest, tokens), sums.recounted)


def stale_summary(root: Root, run: Run, summary: Summary) -> list[str]:
    """The files of the summary that are missing, or are not what the shards add up to."""
    shards = summary.manifest.num_rows
    limits = dict.fromkeys(MANIFEST_SCHEMA.names, Limit(shards, shards * 128))
    vocabulary = dict.fromkeys(TOKEN_SCHEMA.names, Limit(run.spec.target.vocab_size))

    def is_current(name: str) -> bool:
        if name == STATISTICS:
            return decode_record(root.read(name) or b"", DatasetStatistics, name) == summary.statistics
        if name == SUCCESS:
            return decode_record(root.read(name) or b"", Success, name).fingerprint == run.fingerprint
        with root.fetched(name) as path:
            if name == TOKENS:
                return bool(read_table(path, TOKEN_SCHEMA, vocabulary).equals(summary.tokens))
            return bool(read_table(path, MANIFEST_SCHEMA, limits, MANIFEST_SCHEMA.names).equals(summary.manifest))

    stale = []
    for name in (TOKENS, MANIFEST, STATISTICS, SUCCESS):
        try:
            current = is_current(name)
        except (DamageError, MismatchError):
            current = False
        if not current:
            stale.append(name)
    return stale


def _counted_shard(root: Root, run: Run, shard: int) -> tuple[Fragment, pa.Table, bool]:
    """A shard's record and tokens, and whether these had to be counted again."""
    fragment = shard_fragment(root, run, shard)
    table = stored_tokens(root, run, fragment)
    if table is not None:
        return fragment, table, False
    return fragment, counted_tokens(root, run, fragment), True


class _Sums:
    """What is kept of the shards, added one at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._statistics = ShardStatistics()
        self._hidden: dict[int, HiddenError] = {}
        self.manifest: list[dict[str, object]] = []
        self.recounted = 0

    def add(self, fragment: Fragment, table: pa.Table, counted: bool) -> pa.Table:
        """Add a shard and hand its token table on."""
        measured = fragment.info.measured
        self.manifest.append(_manifest_row(fragment))
        self._statistics = merge((self._statistics, measured.statistics))
        for error in measured.hidden:
            self._hidden[error.layer] = _merged(self._hidden.get(error.layer), error)
        self.recounted += counted
        return table

    def statistics(self, manifest: pa.Table, tokens: pa.Table) -> DatasetStatistics:
        """The record over everything that was added, of which these are the tables."""
        total = {name: pc.sum(manifest[name]).as_py() or 0 for name in manifest.column_names if name in _ADDED}
        rows = total["rows"]
        return DatasetStatistics(
            fingerprint=self._run.fingerprint, shards=manifest.num_rows, prompts=total["num_prompts"],
            traces=total["traces"], quarantined=total["quarantined"], tokens=total["tokens"], rows=rows,
            bytes=total["size"] + total["hidden_size"] + total["quarantine_size"],
            head_tv_error_max=pc.max(manifest["head_tv_error_max"]).as_py(),
            head_tv_error_mean=_row_mean(manifest, "head_tv_error_mean"),
            tail_mass_mean=_row_mean(manifest, "tail_mass_mean"),
            hidden=tuple(self._hidden[n] for n in sorted(self._hidden)), coverage=coverage(tokens, rows),
            statistics=self._statistics)


def _row_mean(manifest: pa.Table, column: str) -> float:
    """The mean over rows of what the manifest has as a mean per shard."""
    rows_S = manifest["rows"].to_numpy()
    return float((manifest[column].to_numpy() * rows_S).sum() / max(rows_S.sum(), 1))


def _merged(a: HiddenError | None, b: HiddenError) -> HiddenError:
    if a is None:
        return b
    rows = a.rows + b.rows
    mean = (a.mean * a.rows + b.mean * b.rows) / rows if rows else 0.0
    return HiddenError(layer=b.layer, rows=rows, mean=mean, max=max(a.max, b.max))


def _manifest_row(fragment: Fragment) -> dict[str, object]:
    info = fragment.info
    row: dict[str, object] = {"shard": info.shard}
    for prefix, ref in (("", fragment.file), ("hidden_", info.hidden), ("quarantine_", info.quarantine)):
        row |= {f"{prefix}{name}": getattr(ref, name, None) for name in ("name", "sha256", "size")}
    return row | {name: getattr(info, name) for name in _COUNTS} | {name: getattr(info.measured, name)
                                                                    for name in _MEASURED}


def stored_tokens(root: Root, run: Run, fragment: Fragment) -> pa.Table | None:
    """The token table beside the fragment, or None where there is none or it cannot be that of the shard."""
    limit = Limit(run.spec.target.vocab_size)
    try:
        with root.fetched(token_table_name(fragment_name(fragment.info.shard))) as path:
            table = read_table(path, TOKEN_SCHEMA, dict.fromkeys(TOKEN_SCHEMA.names, limit))
    except DamageError:
        return None
    ids_V, count_V, mass_V = (table[name].to_numpy() for name in TOKEN_SCHEMA.names)
    rows = fragment.info.rows
    plausible = ((np.diff(ids_V) > 0).all() and (count_V >= 0).all() and count_V.sum() == rows
                 and ids_V.min(initial=0) >= 0 and ids_V.max(initial=0) < run.spec.target.vocab_size
                 and (mass_V >= 0).all() and mass_V.sum() <= rows * 1.01)
    return table if plausible else None


def counted_tokens(root: Root, run: Run, fragment: Fragment) -> pa.Table:
    """The token table of a shard, made again from it.

    Raises:
        DamageError: the shard cannot be read.
    """
    try:
        with root.fetched(fragment.file.name, fragment.file.size) as path:
            traces = list(traces_from_table(read_main(path, fragment.info, run.spec.capture)))
        return token_table(traces, run.spec.target.vocab_size)
    except CaptureError as error:
        raise DamageError(f"{root}/{fragment.file.name}: {error}") from error


def _publish(root: Root, path: Path, name: str) -> FileRef:
    ref = FileRef(name=name, sha256=sha256_of(path), size=path.stat().st_size)
    root.publish(path, name)
    return ref
