"""How a shard becomes part of a dataset, exactly once, whatever dies in between.

    scratch files, re-read and checked
      -> sidecars under names that hold their hash        (repeating this is harmless)
      -> main shard at its deterministic name, only if absent     <- this call is the commit
      -> fragment                                          (rebuilt from the footer when missing)

Writers need no lock and may run twice, at the same time or after their driver believes them dead: the first complete
main shard wins and every other attempt adopts it. A crash leaves at most orphan sidecars and scratch folders.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.manifest import (
    FileRef,
    Fragment,
    Measured,
    Run,
    ShardInfo,
    encode_record,
    fragment_name,
    read_fragment,
    shard_name,
    sidecar_name,
)
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import LocalRoot, sha256_of
from distill_pipe.store.shard import (
    QuarantinedPrompt,
    capture_sidecar_info,
    encode_layers,
    main_table,
    read_shard_info,
    read_table,
    traces_from_tables,
    write_main,
    write_quarantine,
    write_sidecar,
)
from distill_pipe.store.trace import Trace

HIDDEN, QUARANTINE = "hidden_states/train", "_quarantine"


@dataclass(frozen=True, slots=True)
class EncodedTrace:
    """A trace whose hidden states are already blobs, so that a shard in the making holds few bytes."""

    trace: Trace
    blobs: Mapping[int, bytes]


def encode_trace(trace: Trace, run: Run) -> EncodedTrace:
    """Encode the hidden states and let go of the raw ones."""
    blobs = encode_layers(trace, run.spec.capture.hidden_codec)
    trace.hidden.clear()
    return EncodedTrace(trace, blobs)


def commit_shard(root: LocalRoot, run: Run, shard: int, traces: Sequence[EncodedTrace],
                 quarantined: Sequence[QuarantinedPrompt]) -> Fragment:
    """Write and commit one shard; returns the fragment of whichever attempt won.

    Raises:
        MismatchError: the traces and quarantined prompts are not exactly the shard's prompts, or the name is taken by
            something that is not this shard.
        StorageFullError: no room; nothing is left behind, as long as renaming needs none.
    """
    traces = sorted(traces, key=lambda t: t.trace.ordinal)
    _require_coverage(run, shard, traces, quarantined)
    with root.scratch() as folder:
        sidecars: dict[Path, FileRef] = {}
        hidden = quarantine = None
        if run.spec.capture.layers and traces:
            hidden = sidecars[folder / "hidden"] = _write_hidden(run, shard, traces, folder / "hidden")
        if quarantined:
            write_quarantine(folder / "quarantine", quarantined)
            quarantine = sidecars[folder / "quarantine"] = _checked_ref(folder / "quarantine", QUARANTINE, shard)
        path = folder / "main"
        table, measured = main_table([t.trace for t in traces], run.spec.capture.logprob_grid)
        info = _shard_info(run, shard, traces, len(quarantined), measured, hidden, quarantine)
        write_main(path, table, info)
        _recheck(path, info)
        fragment = Fragment(file=_file_ref(path, shard_name(shard)), info=info)
        for sidecar, ref in sidecars.items():
            root.publish(sidecar, ref.name)
        if not root.create(path, shard_name(shard)):
            return adopt_shard(root, run, shard)
    root.publish_bytes(encode_record(fragment), fragment_name(shard))
    return fragment


def adopt_shard(root: LocalRoot, run: Run, shard: int) -> Fragment:
    """The fragment of a shard that is already committed; put back when it is missing. Raises as `shard_fragment`."""
    fragment = shard_fragment(root, run, shard)
    if read_fragment(root, shard) != fragment:
        root.publish_bytes(encode_record(fragment), fragment_name(shard))
    return fragment


def shard_fragment(root: LocalRoot, run: Run, shard: int) -> Fragment:
    """The fragment of a committed shard, or what it must have been according to the shard's footer. Writes nothing.

    Raises:
        MismatchError: the file belongs to another run or another place in the plan.
        DamageError: it cannot be read.
    """
    fragment = read_fragment(root, shard)
    if fragment is not None and (fragment.info.fingerprint, fragment.file.name) == (run.fingerprint, shard_name(shard)):
        return fragment
    path = root.local(shard_name(shard))
    info = read_shard_info(path)
    first, stop = shard_range(run, shard)
    if (info.fingerprint, info.shard, info.first_ordinal, info.num_prompts) != (run.fingerprint, shard, first,
                                                                               stop - first):
        raise MismatchError(f"{path} belongs to another run or another shard; it was left untouched")
    return Fragment(file=_file_ref(path, shard_name(shard)), info=info)


def committed_shards(root: LocalRoot) -> set[int]:
    """The shards whose commit has happened; one listing."""
    return set(listed_shards(root)[0])


def listed_shards(root: LocalRoot) -> tuple[list[int], list[str]]:
    """What lies in `data/`: the numbers of main shards, and the names of files that are none."""
    shards, strangers = [], []
    for name in root.names("data"):
        digits = name.removesuffix(".parquet").rpartition("-")[2]
        if digits.isdecimal() and shard_name(int(digits)) == name:
            shards.append(int(digits))
        else:
            strangers.append(name)
    return shards, strangers


def _require_coverage(run: Run, shard: int, traces: Sequence[EncodedTrace],
                      quarantined: Sequence[QuarantinedPrompt]) -> None:
    held = sorted([t.trace.ordinal for t in traces] + [p.ordinal for p in quarantined])
    if held != list(range(*shard_range(run, shard))):
        raise MismatchError(f"shard {shard} would hold {len(held)} prompts that are not exactly those of its plan")


def _write_hidden(run: Run, shard: int, traces: Sequence[EncodedTrace], path: Path) -> FileRef:
    info = capture_sidecar_info(run.spec.capture, run.spec.target.hidden_size, run.fingerprint, shard)
    write_sidecar(path, [t.blobs for t in traces], [t.trace.ordinal for t in traces], info)
    return _checked_ref(path, HIDDEN, shard)


def _checked_ref(path: Path, folder: str, shard: int) -> FileRef:
    """The name that a scratch file will have, after reading it back."""
    read_table(path)
    digest = sha256_of(path)
    return FileRef(name=sidecar_name(folder, shard, digest), sha256=digest, size=path.stat().st_size)


def _file_ref(path: Path, name: str) -> FileRef:
    return FileRef(name=name, sha256=sha256_of(path), size=path.stat().st_size)


def _shard_info(run: Run, shard: int, traces: Sequence[EncodedTrace], num_quarantined: int, measured: Measured,
                hidden: FileRef | None, quarantine: FileRef | None) -> ShardInfo:
    first, stop = shard_range(run, shard)
    return ShardInfo(fingerprint=run.fingerprint, shard=shard, first_ordinal=first, num_prompts=stop - first,
                     attempt=uuid.uuid4().hex, traces=len(traces), tokens=sum(t.trace.num_tokens for t in traces),
                     rows=sum(t.trace.num_rows for t in traces), quarantined=num_quarantined, hidden=hidden,
                     quarantine=quarantine, measured=measured)


def _recheck(path: Path, info: ShardInfo) -> None:
    """Read back what was written: a Parquet writer that met an error can leave a file that opens and is short."""
    traces = list(traces_from_tables(read_table(path), None, None))
    rows = sum(t.num_rows for t in traces)
    if (len(traces), rows) != (info.traces, info.rows):
        raise DamageError(f"shard {info.shard} read back as {len(traces)} traces with {rows} rows, written were "
                          f"{info.traces} with {info.rows}")
