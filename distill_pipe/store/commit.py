"""How a shard becomes part of a dataset, exactly once, whatever dies in between.

    scratch files, re-read and checked
      -> sidecars under names that hold their hash        (repeating this is harmless)
      -> main shard at its deterministic name, only if absent     <- this call is the commit
      -> token table, fragment                             (both can be made again from the shard)

Writers need no lock and may run twice, at the same time or after their driver believes them dead: the first complete
main shard wins and every other attempt adopts it. A crash leaves at most orphan sidecars and scratch folders.
"""

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.errors import MismatchError
from distill_pipe.store.manifest import (
    FileRef,
    Fragment,
    HiddenError,
    Measured,
    Run,
    ShardInfo,
    encode_record,
    fragment_name,
    read_fragment,
    shard_name,
    sidecar_name,
)
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import Root, sha256_of
from distill_pipe.store.shard import (
    QuarantinedPrompt,
    main_table,
    read_main,
    read_quarantine,
    read_shard_info,
    require_counts,
    traces_from_table,
    write_main,
    write_quarantine,
)
from distill_pipe.store.sidecar import EncodedTrace, check_written_sidecar, sidecar_info, write_sidecar
from distill_pipe.store.statistics import (
    shard_statistics,
    token_table,
    token_table_name,
    write_token_table,
)
from distill_pipe.store.trace import Trace

DATA, HIDDEN, QUARANTINE, MANIFEST_FOLDER = "data", "hidden_states/train", "_quarantine", "_manifest"


def commit_shard(root: Root, run: Run, shard: int, traces: Sequence[EncodedTrace],
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
            quarantine = sidecars[folder / "quarantine"] = _write_quarantine(shard, quarantined, folder / "quarantine")
        path = folder / "main"
        table, head_tv_R = main_table([t.trace for t in traces], run.spec.capture.logprob_bits)
        # Statistics are of the rounded rows, so that they can be had again from the shard.
        stored = list(traces_from_table(table))
        measured = _measured(traces, head_tv_R, stored)
        info = _shard_info(run, shard, traces, len(quarantined), measured, hidden, quarantine)
        write_main(path, table, info)
        _recheck(path, info, run)
        # Arrow keeps what it freed, and what comes next is not allocated by it.
        pa.default_memory_pool().release_unused()
        write_token_table(folder / "tokens", token_table(stored, run.spec.target.vocab_size))
        fragment = Fragment(file=_file_ref(path, shard_name(shard)), info=info)
        for sidecar, ref in sidecars.items():
            root.publish(sidecar, ref.name)
        if not root.create(path, shard_name(shard)):
            return adopt_shard(root, run, shard)
        root.publish(folder / "tokens", token_table_name(fragment_name(shard)))
    root.publish_bytes(encode_record(fragment), fragment_name(shard))
    return fragment


def adopt_shard(root: Root, run: Run, shard: int) -> Fragment:
    """The fragment of a shard that is already committed; put back when it is missing. Raises as `shard_fragment`."""
    fragment = shard_fragment(root, run, shard)
    if read_fragment(root, shard) != fragment:
        root.publish_bytes(encode_record(fragment), fragment_name(shard))
    return fragment


def shard_fragment(root: Root, run: Run, shard: int) -> Fragment:
    """The fragment of a committed shard, or what it must have been according to the shard's footer. Writes nothing.

    Raises:
        MismatchError: the file belongs to another run or another place in the plan.
        DamageError: it cannot be read.
    """
    fragment = read_fragment(root, shard)
    if fragment is not None and (fragment.info.fingerprint, fragment.info.shard, fragment.file.name) == (
            run.fingerprint, shard, shard_name(shard)):
        return fragment
    with root.fetched(shard_name(shard)) as path:
        info = read_shard_info(path)
        require_place(path, info, run, shard)
        return Fragment(file=_file_ref(path, shard_name(shard)), info=info)


def require_place(path: Path, info: ShardInfo, run: Run, shard: int) -> None:
    """Raises MismatchError unless the record in a main shard is that of its name, in this run."""
    first, stop = shard_range(run, shard)
    if (info.fingerprint, info.shard, info.first_ordinal, info.num_prompts) != (run.fingerprint, shard, first,
                                                                               stop - first):
        raise MismatchError(f"{path} belongs to another run or another shard; it was left untouched")


def restore_fragments(root: Root, run: Run, shards: Iterable[int]) -> int:
    """Put back the fragments that committed shards lack, and return how many did. One listing, however many shards are
    whole; a fragment that is there is not read. Raises as `shard_fragment`."""
    held = _flags(run, map(_fragment_of, root.names(MANIFEST_FOLDER)))
    lost = [shard for shard in shards if not held[shard]]
    for shard in lost:
        adopt_shard(root, run, shard)
    return len(lost)


def committed_shards(root: Root) -> set[int]:
    """The shards whose commit has happened; one listing."""
    return set(listed_shards(root)[0])


def committed_flags(root: Root, run: Run) -> bytearray:
    """For each shard of a run, 1 where its commit has happened; one listing. A run holds this to its end, and as a set
    ten million shards would take most of a gigabyte."""
    return _flags(run, map(shard_of, root.names(DATA)))


def listed_shards(root: Root) -> tuple[list[int], list[str]]:
    """What lies in `data/`: the numbers of main shards, and the names of files that are none."""
    shards, strangers = [], []
    for name in root.names(DATA):
        shard = shard_of(name)
        if shard is None:
            strangers.append(name)
        else:
            shards.append(shard)
    return shards, strangers


def shard_of(name: str) -> int | None:
    """The number of the main shard that is committed at `name`; None for any other file."""
    digits = name.removesuffix(".parquet").rpartition("-")[2]
    return int(digits) if digits.isdecimal() and shard_name(int(digits)) == name else None


def _fragment_of(name: str) -> int | None:
    digits = name.removesuffix(".json").rpartition("/")[2]
    return int(digits) if digits.isdecimal() and fragment_name(int(digits)) == name else None


def _flags(run: Run, shards: Iterable[int | None]) -> bytearray:
    flags = bytearray(num_shards(run))
    for shard in shards:
        if shard is not None and shard < len(flags):
            flags[shard] = 1
    return flags


def _require_coverage(run: Run, shard: int, traces: Sequence[EncodedTrace],
                      quarantined: Sequence[QuarantinedPrompt]) -> None:
    held = sorted([t.trace.ordinal for t in traces] + [p.ordinal for p in quarantined])
    if held != list(range(*shard_range(run, shard))):
        raise MismatchError(f"shard {shard} would hold {len(held)} prompts that are not exactly those of its plan")


def _write_hidden(run: Run, shard: int, traces: Sequence[EncodedTrace], path: Path) -> FileRef:
    info = sidecar_info(run, shard)
    write_sidecar(path, traces, info)
    check_written_sidecar(path, traces, info)
    return _content_named(path, HIDDEN, shard)


def _write_quarantine(shard: int, prompts: Sequence[QuarantinedPrompt], path: Path) -> FileRef:
    write_quarantine(path, prompts)
    read_quarantine(path, len(prompts))
    return _content_named(path, QUARANTINE, shard)


def _content_named(path: Path, folder: str, shard: int) -> FileRef:
    """The name that a scratch file will have once it was read back."""
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
                     quarantine=quarantine, measured=measured,
                     lengths=tuple(t.trace.num_tokens for t in traces))


def _measured(traces: Sequence[EncodedTrace], head_tv_R: NDArray[np.float64], stored: Sequence[Trace]) -> Measured:
    tail_R = np.concatenate([t.tail_mass_R for t in stored]) if stored else np.empty(0, np.float32)
    layers = traces[0].errors if traces else {}
    errors = {n: np.concatenate([t.errors[n] for t in traces]) for n in layers}
    return Measured(
        head_tv_error_max=float(head_tv_R.max(initial=0)), head_tv_error_mean=_mean(head_tv_R),
        tail_mass_mean=_mean(tail_R), statistics=shard_statistics(stored),
        hidden=tuple(HiddenError(layer=n, rows=len(e), mean=_mean(e), max=float(e.max())) for n, e in errors.items()))


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0


def _recheck(path: Path, info: ShardInfo, run: Run) -> None:
    """Read back what was written: a Parquet writer that met an error can leave a file that opens and is short."""
    traces = list(traces_from_table(read_main(path, info, run.spec.capture), run.spec.target.vocab_size))
    require_counts(path, info, traces)
