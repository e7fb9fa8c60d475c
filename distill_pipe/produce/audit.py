"""Are stored rows what the target says? Replays some traces through Hugging Face transformers and compares.

A second implementation of the same model is the only check that sees what the engine itself got wrong: rows shifted by
one, a wrong layer, a norm on the wrong side, rows of another request. The trade-off: two correct implementations differ
by the noise of their dtype, so differences are held against a limit. What the format is known to do is first taken off:
of a number, half a unit of its last stored bit; of a state, the codec's own error as it was measured while writing.

Shapes: T tokens, R rows, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from distill_pipe.errors import CaptureError, DamageError, MismatchError, UsageError
from distill_pipe.produce.comparison import AuditReport, Comparison, exceeded, layers, numbers
from distill_pipe.produce.replay import Dtype, Replayer, load_model
from distill_pipe.produce.targets import Target, resolve_target
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.hidden_codec import decode_layers
from distill_pipe.store.manifest import Fragment, Run, require_run
from distill_pipe.store.root import Root
from distill_pipe.store.shard import MAIN_SCHEMA, read_main, traces_from_table
from distill_pipe.store.sidecar import blobs_of, read_sidecar, read_sidecar_info, require_same_traces, sidecar_info

# How far two correct implementations may lie apart on average, by the coarser dtype of engine and replay: nats of a
# number beyond rounding, and relative error of a state beyond its codec. SmolLM2 measures 2e-6 and 3e-6 in float32, and
# 0.13 (logsumexp; the head 0.05) and 3 % in bfloat16; float16 has three bits more. What must not pass is larger: a row
# that is off by one differs by 7.5 nats, one at temperature 0.9 by 0.5, the next layer by 23 % or more.
NOISE: Final = {"float32": (1e-3, 1e-3), "float16": (0.03, 0.01), "bfloat16": (0.25, 0.05)}


class Limits(NamedTuple):
    """The largest mean difference, beyond rounding, that any column of numbers may have; and the largest mean relative
    error, beyond the codec's own, of any layer. What is None follows the dtype; see `NOISE`."""

    logprob: float | None = None
    hidden: float | None = None


BY_DTYPE: Final = Limits()


def audit_dataset(root: Root, traces: int, dtype: Dtype = "float32", target: str | None = None,
                  limits: Limits = BY_DTYPE, on_start: Callable[[int], None] | None = None) -> AuditReport:
    """Replay `traces` traces, spread evenly over what is committed, in `dtype`.

    Args:
        target: where the model is, when the recorded name does not lead there.
        on_start: called with the number of traces when all is in order and the model is about to be loaded.

    Raises:
        UsageError: there is nothing to replay, or the model cannot be loaded.
        MismatchError: there is no dataset, or its target is another model.
        DamageError: a shard cannot be read.
    """
    run = require_run(root)
    if traces < 1:
        raise UsageError(f"--traces {traces}: at least 1 trace must be replayed")
    fragments = {shard: shard_fragment(root, run, shard) for shard in sorted(committed_shards(root))}
    picked = pick_traces({shard: f.info.traces for shard, f in fragments.items()}, traces)
    if not picked:
        raise UsageError(f"{root} has no trace yet; there is nothing to audit")
    found = _find_target(run, target)
    checked = _require_same_target(run, found)
    if on_start is not None:
        on_start(sum(map(len, picked.values())))
    replayer = Replayer(load_model(found, dtype), run.spec.capture.layers, run.spec.target.num_layers)
    noise = max(NOISE[dtype], NOISE.get(run.spec.target.dtype, NOISE["bfloat16"]))
    compared = Comparison(run.spec.capture.logprob_bits, tie=noise[0])
    for shard, indices in picked.items():
        _audit_shard(root, run, fragments[shard], indices, replayer, compared)
    columns, states = numbers(compared), layers(compared, [fragments[shard] for shard in picked])
    bounds = [default if given is None else given for given, default in zip(limits, noise, strict=True)]
    return AuditReport(
        root=str(root), target=run.spec.target.name, revision_checked=checked, engine_dtype=run.spec.target.dtype,
        dtype=dtype, device=replayer.device.type, ordinals=tuple(compared.ordinals), rows=compared.rows,
        numbers=columns, layers=states, top1_agreement=compared.agreed / max(compared.rows, 1),
        top1_ties=compared.ties / max(compared.rows, 1), alpha_drift_mean=compared.drift.mean,
        alpha_drift_max=compared.drift.max, nonfinite_rows=compared.nonfinite_rows,
        nonfinite_states=compared.nonfinite_states, nonfinite_differences=compared.nonfinite_differences,
        max_logprob_error=bounds[0], max_hidden_error=bounds[1], exceeded=exceeded(compared, columns, states, bounds))


def pick_traces(traces_by_shard: Mapping[int, int], wanted: int) -> dict[int, list[int]]:
    """`wanted` traces (all, where there are fewer) at equal distances over the dataset: row numbers by shard."""
    ends = np.cumsum(list(traces_by_shard.values()), dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    wanted = min(wanted, total)
    picked: dict[int, list[int]] = {}
    shards = list(traces_by_shard)
    for i in range(wanted):
        index = (2 * i + 1) * total // (2 * wanted)
        at = int(np.searchsorted(ends, index, side="right"))
        shard = shards[at]
        picked.setdefault(shard, []).append(index - int(ends[at]) + traces_by_shard[shard])
    return picked


def _find_target(run: Run, name: str | None) -> Target:
    revision = run.spec.target.revision
    try:
        return resolve_target(name or run.spec.target.name, None if revision.startswith("sha256:") else revision)
    except UsageError as error:
        hint = "" if name else f"; --target says where {run.spec.target.name} is"
        raise UsageError(f"{error}{hint}") from None


def _require_same_target(run: Run, found: Target) -> bool:
    """Refuse another model; returns whether its weights could be identified. A hub commit and the hash of a local
    folder name the same weights in two ways that cannot be compared; then the rest must be equal."""
    stored, given = run.spec.target, found.spec
    checked = stored.revision.startswith("sha256:") == given.revision.startswith("sha256:")
    facts = ["architecture", "vocab_size", "hidden_size", "num_layers", "tokenizer_sha256"] + ["revision"] * checked
    differing = [f"{fact} is {getattr(given, fact)}, recorded {getattr(stored, fact)}"
                 for fact in facts if getattr(given, fact) != getattr(stored, fact)]
    if differing:
        raise MismatchError(f"{found.folder} is not the target of this dataset: {'; '.join(differing)}")
    return checked


def _audit_shard(root: Root, run: Run, fragment: Fragment, indices: list[int], replayer: Replayer,
                 compared: Comparison) -> None:
    path = f"{root}/{fragment.file.name}"
    with root.fetched(fragment.file.name, fragment.file.size) as copy:
        main = read_main(copy, fragment.info, run.spec.capture)
    if main.num_rows != fragment.info.traces:
        raise DamageError(f"{path} holds {main.num_rows} traces; its record says {fragment.info.traces}")
    for index, stored in zip(indices, _stored_states(root, run, fragment, main, indices), strict=True):
        part = main.slice(index, 1)
        nonfinite = _nonfinite(part)
        compared.nonfinite_rows += nonfinite
        if nonfinite:
            continue
        try:
            [trace] = traces_from_table(part, run.spec.target.vocab_size)
        except CaptureError as error:
            raise DamageError(f"{path}: {error}") from error
        final_RH, replayed = replayer.states(trace)
        for layer, stored_TH in stored.items():
            if stored_TH.shape != replayed[layer].shape:
                raise DamageError(f"{path}: prompt {trace.ordinal} has {trace.num_tokens} tokens, and {len(stored_TH)} "
                                  f"states of layer {layer}")
            compared.add_states(layer, stored_TH, replayed[layer])
        compared.add_rows(trace, replayer.rows(trace, final_RH, run.spec.target.vocab_size))


def _stored_states(root: Root, run: Run, fragment: Fragment, main: pa.Table,
                   indices: list[int]) -> Iterator[dict[int, Tensor]]:
    """The decoded states of each trace, by layer; decoded when asked for."""
    info = sidecar_info(run, fragment.info.shard)
    if not info.layers:
        yield from ({} for _ in indices)
        return
    if fragment.info.hidden is None:
        raise DamageError(f"{root}/{fragment.file.name}: its record lacks the hidden-state sidecar")
    with root.fetched(fragment.info.hidden.name, fragment.info.hidden.size) as path:
        if read_sidecar_info(path) != info:
            raise DamageError(f"{path} does not hold what this run captures of shard {info.shard}")
        table = read_sidecar(path, info, info.layers, fragment.info.traces, fragment.info.tokens)
    require_same_traces(table, main["ordinal"].to_pylist())
    for index in indices:
        yield decode_layers(blobs_of(table, info, index), info.codec, info.hidden_size)


def _nonfinite(part: pa.Table) -> int:
    columns = [f.name for f in MAIN_SCHEMA if f.type == pa.list_(pa.float32())]
    values = [part[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in columns]
    return sum(int(np.count_nonzero(~np.isfinite(v))) for v in values)
