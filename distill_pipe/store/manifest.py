"""The small records that say what a dataset is and which shards are in it.

`run.json` freezes the run and is written once, before any engine starts. Each committed shard carries its own record
(`ShardInfo`) in its Parquet footer; the fragment in `_manifest/` repeats it with the file's hash and size, so that a
reader needs one small file instead of a footer. A fragment is a convenience: when lost, it is rebuilt from the shard.

Records of shards may gain fields and are read without those that this version does not know; run.json may not, since a
field that is not understood there could change what every number means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from distill_pipe.errors import MismatchError
from distill_pipe.store.root import Root, sha256_of
from distill_pipe.store.spec import FORMAT_VERSION, RunSpec, Sha256, spec_differences
from distill_pipe.store.statistics import ShardStatistics

RUN = "run.json"
FINAL_NORM = "target/final_norm.parquet"
SHARDS_PER_FOLDER = 1000
Record = TypeVar("Record", bound=Struct)
Count = Annotated[int, Meta(ge=0)]
# No part starts with a dot, so no name leads out of the root.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")]


class FileRef(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the dataset: name relative to the root, content hash, bytes."""

    name: Name
    sha256: Sha256
    size: Count


class Run(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """run.json: the frozen identity, its fingerprint, the plan files it was cut into, and who wrote it."""

    format_version: int = FORMAT_VERSION
    fingerprint: Sha256
    spec: RunSpec
    plan: tuple[FileRef, ...]
    created_by: str
    created_at: str


class HiddenError(Struct, frozen=True, kw_only=True):
    """What the codec did to one layer: relative error (length of the error over length of the row, decoded to float32)
    of `rows` rows that were decoded again while the shard was written."""

    layer: Count
    rows: Count
    mean: float
    max: float


class Measured(Struct, frozen=True, kw_only=True):
    """What was measured while the shard was written. `head_tv_error_*`: the total variation that rounding put into the
    head of a row, scaled as a reader scales it; the largest over the rows, and the mean."""

    head_tv_error_max: float
    head_tv_error_mean: float
    tail_mass_mean: float
    hidden: tuple[HiddenError, ...]
    statistics: ShardStatistics


class ShardInfo(Struct, frozen=True, kw_only=True):
    """The record inside a main shard's footer. `first_ordinal` and `num_prompts` are its range in the plan; `lengths`
    are the tokens of each trace, in the shard's order, so that batches can be planned without the shard."""

    format_version: int = FORMAT_VERSION
    fingerprint: Sha256
    shard: Count
    first_ordinal: Count
    num_prompts: Count
    attempt: str
    traces: Count
    tokens: Count
    rows: Count
    quarantined: Count
    hidden: FileRef | None
    quarantine: FileRef | None
    measured: Measured
    lengths: tuple[Count, ...] | None = None


class Fragment(Struct, frozen=True, kw_only=True):
    """_manifest/0000/0000123.json: a committed main shard and its record."""

    file: FileRef
    info: ShardInfo


def shard_name(shard: int) -> str:
    """Where main shard `shard` is committed."""
    return f"data/train/{shard // SHARDS_PER_FOLDER:04d}/shard-{shard:07d}.parquet"


def sidecar_name(folder: str, shard: int, sha256: str) -> str:
    """Where a content-named companion of `shard` lies; `folder` is `hidden_states/train` or `_quarantine`."""
    return f"{folder}/{shard // SHARDS_PER_FOLDER:04d}/shard-{shard:07d}-{sha256[:8]}.parquet"


def fragment_name(shard: int) -> str:
    """Where the fragment of `shard` lies."""
    return f"_manifest/{shard // SHARDS_PER_FOLDER:04d}/{shard:07d}.json"


def encode_record(record: Struct) -> bytes:
    """A record as JSON for people: fields in order, one per line."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=1) + b"\n"


def read_run(root: Root) -> Run | None:
    """run.json, or None where no run was started.

    Raises:
        MismatchError: it cannot be read by this version, or its fingerprint does not match its own content.
    """
    data = root.read(RUN)
    if data is None:
        return None
    run = decode_record(data, Run, f"{root}/{RUN}")
    if run.spec.fingerprint != run.fingerprint:
        raise MismatchError(f"{root}/{RUN} was edited: its fingerprint does not match its content")
    return run


def require_run(root: Root) -> Run:
    """run.json of an existing dataset.

    Raises:
        MismatchError: there is none, or it cannot be read.
    """
    run = read_run(root)
    if run is None:
        raise MismatchError(f"{root} is not a distill-pipe dataset: it has no {RUN}")
    return run


def require_same_run(root: Root, stored: Run, given: RunSpec) -> None:
    """Refuse to continue a dataset under other settings.

    Raises:
        MismatchError: naming every field that differs.
    """
    if stored.fingerprint != given.fingerprint:
        lines = "\n  ".join(spec_differences(stored.spec, given))
        raise MismatchError(f"{root} belongs to another run; use another output folder, or the settings it was made "
                            f"with. Fields that differ:\n  {lines}")


def read_fragment(root: Root, shard: int) -> Fragment | None:
    """The fragment of `shard`, or None where there is none or it cannot be trusted (it is rebuilt then)."""
    data = root.read(fragment_name(shard))
    if data is None:
        return None
    try:
        return decode_record(data, Fragment, fragment_name(shard))
    except MismatchError:
        return None


@contextmanager
def checked(root: Root, ref: FileRef) -> Iterator[Path]:
    """A file that is what its record says, as a local path.

    Raises:
        MismatchError: it is missing, or has another size or hash.
    """
    where, size = f"{root}/{ref.name}", root.size(ref.name)
    if size is None:
        raise MismatchError(f"{where} is missing")
    if size != ref.size:
        raise MismatchError(f"{where} has {size} bytes, expected {ref.size}")
    with root.fetched(ref.name, ref.size) as path:
        if sha256_of(path) != ref.sha256:
            raise MismatchError(f"{where} has changed: its sha256 is not the one recorded")
        yield path


def check_file(root: Root, ref: FileRef) -> None:
    """Hold a file against its record. Raises as `checked`."""
    with checked(root, ref):
        return


def decode_record(data: bytes, kind: type[Record], where: str) -> Record:
    """Decode one of our JSON records strictly.

    Raises:
        MismatchError: the format version is unknown, or a field is missing, unknown or of the wrong type.
    """
    try:
        record = msgspec.json.decode(data, type=_Version)
        for version in (record.format_version, record.info.format_version if record.info else None):
            if version not in (None, FORMAT_VERSION):
                raise MismatchError(f"{where} has format version {version}; this distill-pipe reads version "
                                    f"{FORMAT_VERSION}. Install a newer one.")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MismatchError(f"{where} cannot be read: {error}") from error


class _Version(Struct):
    """The version of a record, or of the one that a fragment wraps."""

    format_version: int | None = None
    info: "_Version | None" = None


# Two threads that are the first to decode a type at the same moment can crash the process: be the first here.
for _kind in (_Version, Run, ShardInfo, Fragment):
    msgspec.json.Decoder(_kind)
