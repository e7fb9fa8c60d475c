"""A real run over a few prompts, in a folder that is gone afterwards, for rates that are measured and not assumed.

The probe keeps float32 states and encodes them with every codec, so that the bytes of all of them are known: from
float32 states every codec makes what it would have made of the engine's. The price is a pass per codec, and float32
states of one shard in memory.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from distill_pipe.errors import UsageError
from distill_pipe.produce.driver import POLL_SECONDS
from distill_pipe.produce.generate import generate
from distill_pipe.produce.job import Job
from distill_pipe.produce.normalise import record_of
from distill_pipe.produce.rates import CODECS, UNITS, Rates
from distill_pipe.produce.sample import fresh_positions, shared_prefix
from distill_pipe.produce.worker import Progress
from distill_pipe.store.column_sizes import column_sizes
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import Fragment, Run
from distill_pipe.store.plan import PlannedPrompt
from distill_pipe.store.root import LocalRoot, existing_folder, open_root
from distill_pipe.store.shard import MAIN_SCHEMA, read_main, traces_from_table
from distill_pipe.store.sidecar import (
    EncodedTrace,
    blobs_of,
    layer_column,
    read_sidecar,
    scale_column,
    sidecar_info,
    write_sidecar,
)
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.trace import Trace


class Probe(Struct, frozen=True, kw_only=True):
    """What a probe ran. `response_tokens` are the shortest, quartiles and longest; `tokens_per_second` are of one
    engine, and hours of the whole run on all of its engines."""

    prompts: int
    traces: int
    tokens: int
    rows: int
    response_tokens: tuple[int, ...]
    tokens_per_second: float
    hours: float


def run_probe(job: Job, prompts: Sequence[PlannedPrompt]) -> tuple[Probe, Rates]:
    """Really run a few prompts, in a temporary folder that is gone afterwards. `Probe.hours` is left at 0."""
    # Engines on other machines see what lies beside the dataset, and not this machine's temporary folder.
    if job.address and not isinstance(open_root(job.out), LocalRoot):
        raise UsageError("a probe on a cluster writes beside the dataset, which must be in a folder that all of it "
                         "shares; leave out --probe, or give such a folder as `out`")
    parent = existing_folder(Path(job.out).absolute().parent) if job.address else None
    with tempfile.TemporaryDirectory(prefix="distill-pipe-probe-", dir=parent) as folder:
        corpus = Path(folder, "prompts.jsonl")
        corpus.write_bytes(b"".join(msgspec.json.encode(record_of(p)) + b"\n" for p in prompts))
        small = replace(job, corpus=str(corpus), out=str(Path(folder, "dataset")), limit=None,
                        prompts_per_shard=min(job.prompts_per_shard, len(prompts)),
                        capture=replace(job.capture, hidden_codec="f32"))
        clock = _Clock()
        run = generate(small, clock.start, clock.tick)
        probe, rates = _measure(LocalRoot(small.out), run, job.capture.hidden_codec)
        rate = clock.rate / min(job.workers, run.spec.num_shards)
        return replace(probe, prompts=len(prompts), tokens_per_second=rate), rates


class _Clock:
    """Tokens per second since the first engine answered; it had worked for one poll then."""

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self._tokens = 0

    def start(self, run: Run, shards_left: int) -> None: ...

    def tick(self, progress: Progress) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last - POLL_SECONDS
        self._tokens += progress.tokens

    @property
    def rate(self) -> float:
        return self._tokens / max(self._last - self._first, 1e-3)


def _measure(root: LocalRoot, run: Run, codec: HiddenCodec) -> tuple[Probe, Rates]:
    """Rates from the written files: compressed bytes of every column, and what a file has beside them."""
    columns = Counter[str]()
    hidden = {other: Counter[int]() for other in CODECS}
    footers = 0
    tokens: list[int] = []
    shared: list[int] = []
    rows: list[int] = []
    for shard in sorted(committed_shards(root)):
        fragment = shard_fragment(root, run, shard)
        path = root.local(fragment.file.name)
        traces = list(traces_from_table(read_main(path, fragment.info, run.spec.capture)))
        ids = [trace.token_ids_T.tolist() for trace in traces]
        tokens += map(len, ids)
        rows += [trace.num_rows for trace in traces]
        shared += [shared_prefix(a, b) for a, b in zip(ids, [[], *ids], strict=False)]
        found = column_sizes(path)
        columns.update(found)
        footers += path.stat().st_size - sum(found.values())
        for other, (states, beside) in _recoded(root, run, fragment, traces).items():
            hidden[other].update(states)
            footers += beside * (other == codec)
    if not rows:
        raise UsageError("every prompt of the probe was quarantined; try a larger --probe")
    units = {"trace": len(rows), "token": sum(tokens), "row": sum(rows)}
    fresh = max(fresh_positions(np.asarray(tokens), np.asarray(shared), run.spec.target.hidden_size), 1)
    records = sum(root.local(name).stat().st_size for name in root.names("_manifest"))
    rates = Rates({name: columns[name] / units[UNITS.get(name, "row")] for name in MAIN_SCHEMA.names},
                  {other: {n: size / fresh for n, size in layers.items()} for other, layers in hidden.items()},
                  footers / run.spec.num_shards, records / units["row"])
    quartiles = tuple(int(q) for q in np.quantile(rows, (0, 0.25, 0.5, 0.75, 1)))
    return Probe(prompts=0, traces=len(rows), tokens=units["token"], rows=units["row"], response_tokens=quartiles,
                 tokens_per_second=0.0, hours=0.0), rates


def _recoded(root: LocalRoot, run: Run, fragment: Fragment,
             traces: Sequence[Trace]) -> dict[HiddenCodec, tuple[dict[int, int], int]]:
    """A shard's sidecar by every codec: bytes of each layer, and beside them. From float32 states every codec makes the
    bytes that it would have made of the engine's."""
    if fragment.info.hidden is None:
        return {}
    # Here, because a plan without a probe needs no torch.
    from distill_pipe.store.hidden_codec import decode_layers, encode_hidden

    sizes: dict[HiddenCodec, tuple[dict[int, int], int]] = {}
    info = sidecar_info(run, fragment.info.shard)
    table = read_sidecar(root.local(fragment.info.hidden.name), info, info.layers, len(traces), fragment.info.tokens)
    for codec in CODECS:
        encoded = []
        for i, trace in enumerate(traces):
            states = decode_layers(blobs_of(table, info, i), "f32", info.hidden_size)
            encoded.append(EncodedTrace(trace, {n: encode_hidden(h_TH, codec) for n, h_TH in states.items()}))
        with root.scratch() as folder:
            write_sidecar(folder / codec, encoded, replace(info, codec=codec))
            found = column_sizes(folder / codec)
            layers = {n: found[layer_column(n)] + found.get(scale_column(n), 0) for n in info.layers}
            sizes[codec] = (layers, (folder / codec).stat().st_size - sum(layers.values()))
    return sizes
