"""What a run will cost, before any of it is paid: tokens, bytes by column, devices, and with a probe also hours.

A sample of the corpus gives the tokens (`sample`), rates the bytes (`rates`, or measured by `probe`), and headers and
config.json the memory (`memory`). The trade-off: the rates are of one target on chat and code, so another target
deserves a probe.
"""

import tempfile
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from distill_pipe.errors import EngineError, UsageError
from distill_pipe.produce.characters import BYTES_PER_TOKEN, CharacterRenderer
from distill_pipe.produce.chat import Renderer
from distill_pipe.produce.corpus import read_prompts
from distill_pipe.produce.engines import vllm_spec
from distill_pipe.produce.generate import not_ours, prepare
from distill_pipe.produce.gpus import parse_gpus
from distill_pipe.produce.job import Job
from distill_pipe.produce.layouts import describe
from distill_pipe.produce.memory import Load, Memory, find_device, plan_memory
from distill_pipe.produce.model_config import count_parameters
from distill_pipe.produce.preset import Layout
from distill_pipe.produce.probe import Probe, run_probe
from distill_pipe.produce.rates import MARGIN, CodecBytes, Rate, cost_of, require_room, usual_rates
from distill_pipe.produce.sample import Sample, Totals, evenly, read_sample
from distill_pipe.produce.targets import NO_HASH, Target, planned_target
from distill_pipe.produce.throughput import Throughput, Work, estimate
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import read_run, require_same_run
from distill_pipe.store.plan import write_plan_part
from distill_pipe.store.root import Root, open_root
from distill_pipe.store.spec import EngineSpec, HiddenCodec, RunSpec

SAMPLE: Final = 512
_NO_ENGINE: Final = "not installed"


class Forecast(Struct, frozen=True, kw_only=True):
    """All that `plan` and `--dry-run` print. `bytes` is what `status` will count; `disk_bytes` adds plan and records.
    `disk_bytes_longest` is for responses that all reach max_tokens."""

    target: str
    fingerprint: str | None
    prompts: int
    prompts_measured: int
    prompts_too_long: int
    prompts_refused: int
    shards: int
    shards_left: int
    responses: str
    response_tokens_mean: float
    response_tokens_from: str
    tokens: int
    rows: int
    layers: tuple[int, ...]
    top_k: int
    coverage: float | None
    tail_samples: int
    hidden_codec: HiddenCodec
    columns: tuple[Rate, ...]
    hidden_layers: tuple[Rate, ...]
    footer_bytes: int
    plan_bytes: int
    record_bytes: int
    codecs: tuple[CodecBytes, ...]
    bytes: int
    bytes_per_token: float
    bytes_per_row: float
    disk_bytes: int
    disk_bytes_longest: int
    free_bytes: int | None
    memory: Memory
    layout: str
    throughput: Throughput | None
    probe: Probe | None
    notes: tuple[str, ...]


def forecast(job: Job, *, sample: int = SAMPLE, probe: int = 0, gpu_memory: float | None = None) -> Forecast:
    """What `generate` would do and cost. Writes nothing below the job's `out`.

    Raises:
        UsageError: the job is wrong, or the target does not fit its device.
        StorageFullError: the dataset does not fit the disk.
    """
    target, spec = prepare(job, _engine, planned_target)
    root = open_root(job.out) if job.out else None
    left = spec.num_shards if root is None else _shards_left(root, spec)
    renderer = CharacterRenderer() if target.files is None else Renderer(target.files)
    read = read_sample(job, spec, renderer, evenly(spec.corpus.prompts, sample))
    response, source = _assumed_response(job, target)
    totals, engines = read.totals(spec, response), min(job.workers, spec.num_shards)
    device, probed, rates = find_device(gpu_memory, job.address, job.gpus), None, usual_rates(spec, read, totals)
    # Before a probe too: a target that cannot fit should not be loaded to find out.
    memory = plan_memory(target, spec, _load(job, totals), engines, device, job.engine)
    if probe:
        wanted = set(evenly(spec.corpus.prompts, probe))
        prompts = [p for p in read_prompts(job.corpus_files, job.responses, job.limit) if p.ordinal in wanted]
        probed, rates = run_probe(job, prompts)
        if job.responses == "target":
            response, source = probed.rows / probed.traces, "the probe"
            totals = read.totals(spec, response)
            memory = plan_memory(target, spec, _load(job, totals), engines, device, job.engine)
        probed = replace(probed, hours=totals.token / probed.tokens_per_second / engines / 3600)
    speed = _throughput(job, target, memory, totals)
    cost = cost_of(rates, totals, spec, _plan_bytes(read, spec))
    longest = cost_of(rates, read.totals(spec, job.sampling.max_tokens), spec, cost.plan)
    free, tight = None if root is None else root.free_bytes(), False
    if free is not None:
        require_room(cost, spec, left / spec.num_shards, free, job.out)
        tight = longest.disk * left / spec.num_shards > free / MARGIN
    share = spec.corpus.prompts / len(read.prompts)
    known = target.files is not None and spec.engine.name != _NO_ENGINE
    return Forecast(
        target=spec.target.name, fingerprint=spec.fingerprint if known else None,
        prompts=spec.corpus.prompts, prompts_measured=len(read.prompts),
        prompts_too_long=round(read.faults["too_long"] * share), prompts_refused=round(read.faults["refused"] * share),
        shards=spec.num_shards, shards_left=left, responses=spec.responses,
        response_tokens_mean=totals.row / totals.trace, response_tokens_from=source, tokens=round(totals.token),
        rows=round(totals.row), layers=spec.capture.layers, top_k=spec.capture.top_k, coverage=spec.capture.coverage,
        tail_samples=spec.capture.tail_samples, hidden_codec=spec.capture.hidden_codec, columns=cost.columns,
        hidden_layers=cost.layers, footer_bytes=cost.footers, plan_bytes=cost.plan, record_bytes=cost.records,
        codecs=cost.codecs, bytes=cost.data, bytes_per_token=cost.data / totals.token,
        bytes_per_row=cost.data / totals.row, disk_bytes=cost.disk, disk_bytes_longest=longest.disk, free_bytes=free,
        memory=memory, layout=_layout(job, engines), throughput=None if probed else speed, probe=probed,
        notes=_notes(job, target, read, memory, probed, speed, tight))


def _layout(job: Job, engines: int) -> str:
    """In words, with the GPUs that stay idle."""
    options = job.engine
    layout = describe(Layout(tp=options.tensor_parallel_size, pp=options.pipeline_parallel_size,
                             ep=options.enable_expert_parallel))
    text = f"{engines} x ({layout})"
    if job.gpus is None:
        return text
    idle = parse_gpus(job.gpus).count - engines * options.devices
    return f"{text} on {job.gpus}" + (f"; {idle} stay idle" if idle else "")


def _throughput(job: Job, target: Target, memory: Memory, totals: Totals) -> Throughput | None:
    """Hours by arithmetic, where it is said what the engines run on."""
    if job.gpus is None:
        return None
    work = Work(totals, job.responses, job.engine.max_num_seqs)
    return estimate(work, memory, count_parameters(target.config).active, parse_gpus(job.gpus).gpu)


def _notes(job: Job, target: Target, read: Sample, memory: Memory, probed: Probe | None,
           speed: Throughput | None, longest_is_too_much: bool) -> tuple[str, ...]:
    """What the figures rest on, and what may go wrong although nothing is refused."""
    notes = list(memory.assumptions)
    if target.files is None:
        notes.append(f"the files of {target.model} cannot be had here: facts are the preset's, and tokens are "
                     f"estimated at {BYTES_PER_TOKEN} bytes of text each, good to about a quarter")
    if probed is None:
        notes.append("bytes are by rates measured on SmolLM2-135M; --probe 32 measures this target")
        notes += [speed.assumption] if speed else []
        if job.responses == "target":
            length, source = _assumed_response(job, target)
            notes.append(f"responses are assumed to have {length:,.0f} tokens, {source}")
    elif probed.prompts < job.engine.max_num_seqs:
        notes.append(f"{probed.prompts} prompts do not fill a batch of {job.engine.max_num_seqs}: hours are an upper "
                     "bound")
    if probed is not None and probed.prompts < min(job.prompts_per_shard, len(read.prompts)):
        notes.append("the probe's shard is smaller than the run's, and compresses a little worse")
    if job.capture.coverage is not None and probed is None:
        notes.append("head entries per row depend on the target; only a probe knows them")
    if longest_is_too_much:
        notes.append("WARNING: the disk is too small should every response reach max_tokens")
    if memory.fitting_sequences is not None and memory.fitting_sequences < job.engine.max_num_seqs:
        notes.append(f"WARNING: {memory.fitting_sequences} sequences of mean length fit the KV cache, max_num_seqs is "
                     f"{job.engine.max_num_seqs}: the rest waits")
    return tuple(notes)


def _engine(max_model_len: int) -> EngineSpec:
    """The installed engine; a stand-in where there is none, since only a fingerprint needs it."""
    try:
        return vllm_spec(max_model_len)
    except EngineError:
        return EngineSpec(name=_NO_ENGINE, version="0", max_model_len=max_model_len)


def _shards_left(root: Root, spec: RunSpec) -> int:
    stored = read_run(root)
    if stored is None:
        if not root.is_unused():
            raise UsageError(not_ours(root))
        return spec.num_shards
    if spec.target.tokenizer_sha256 == NO_HASH:
        spec = replace(spec, target=stored.spec.target)
    if spec.engine.name == _NO_ENGINE:
        spec = replace(spec, engine=replace(stored.spec.engine, max_model_len=spec.engine.max_model_len))
    require_same_run(root, stored, spec)
    return spec.num_shards - len(committed_shards(root))


def _assumed_response(job: Job, target: Target) -> tuple[float, str]:
    if job.responses == "corpus":
        return 0, "the corpus"
    half, guess = max(job.sampling.max_tokens / 2, 1), target.response_tokens
    return (half, "half of max_tokens") if guess is None or half < guess else (guess, "the preset's guess")


def _load(job: Job, totals: Totals) -> Load:
    sequences = min(job.engine.max_num_seqs, round(totals.trace))
    return Load(totals.token / totals.trace, totals.row / totals.trace, sequences)


def _plan_bytes(read: Sample, spec: RunSpec) -> int:
    """The plan of the sample, scaled to the corpus."""
    size = spec.prompts_per_shard
    with tempfile.TemporaryDirectory(prefix="distill-pipe-plan-") as folder:
        path = Path(folder, "plan")
        write_plan_part(path, (read.prompts[i:i + size] for i in range(0, len(read.prompts), size)))
        return round(path.stat().st_size * spec.corpus.prompts / len(read.prompts))
