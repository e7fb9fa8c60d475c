"""The main job: a corpus in, a dataset out. Checks everything before anything is written, and resumes by itself.

The order is: resolve the target, read the corpus once to check and count it, freeze run and plan, then run the shards
that are not committed. Reading the corpus twice on a fresh run is the price of an untouched disk when it is wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice

import distill_pipe
from distill_pipe.errors import QuarantineLimitError, UsageError, failure_class
from distill_pipe.produce.chat import TooLongError
from distill_pipe.produce.cluster import ClusterPlan, run_on_ray
from distill_pipe.produce.corpus import corpus_files, read_prompts
from distill_pipe.produce.engines import engine_for, renderer_for, vllm_spec
from distill_pipe.produce.job import Job
from distill_pipe.produce.journal import Journal
from distill_pipe.produce.layers import resolve_layers
from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.produce.schedule import Limits
from distill_pipe.produce.targets import Target, resolve_target
from distill_pipe.produce.worker import Progress
from distill_pipe.redact import redacted
from distill_pipe.store.card import write_card
from distill_pipe.store.commit import committed_flags, restore_fragments
from distill_pipe.store.manifest import (
    RUN,
    FileRef,
    Run,
    ShardInfo,
    check_file,
    encode_record,
    read_run,
    require_run,
    require_same_run,
)
from distill_pipe.store.plan import SHARDS_PER_PART, PlannedPrompt, num_shards, write_plan_part
from distill_pipe.store.quarantine import FAILED, read_given_up
from distill_pipe.store.root import Root, open_root, sha256_of
from distill_pipe.store.selftest import require_exclusive_create
from distill_pipe.store.spec import CaptureSpec, CorpusSpec, EngineSpec, RunSpec


def prepare(job: Job, engine_spec: Callable[[int], EngineSpec] = vllm_spec,
            find: Callable[[str, str | None, str | None], Target] = resolve_target) -> tuple[Target, RunSpec]:
    """Check a job against its target and corpus; writes nothing. `engine_spec` says which engine a context length is
    for, `find` where the target's facts are from.

    Raises:
        UsageError: naming what to change.
    """
    files = corpus_files(job.corpus_files)
    target = find(job.target, job.revision, job.dtype)
    choice, depth = job.capture.layers, target.spec.num_layers
    layers = target.default_layers if choice is None else resolve_layers(choice, depth)
    capture = job.capture.spec(layers)
    _check_capture(job, target, capture)
    length = job.max_model_len or target.default_len
    prompts = sum(1 for _ in read_prompts(job.corpus_files, job.responses, job.limit))
    if prompts == 0:
        raise UsageError(f"corpus {', '.join(map(str, job.corpus_files))} holds no records")
    spec = RunSpec(target=target.spec, corpus=CorpusSpec(files=files, prompts=prompts), responses=job.responses,
                   sampling=job.sampling if job.responses == "target" else None, capture=capture,
                   engine=engine_for(target.spec, length, engine_spec), prompts_per_shard=job.prompts_per_shard)
    return target, spec


def generate(job: Job, on_start: Callable[[Run, int], None], on_progress: Callable[[Progress], None],
             journal: Journal | None = None, stopping: Callable[[], bool] = lambda: False) -> Run:
    """Run a job to its end; whatever is committed already is kept. `on_start` gets the run and the shards left.

    Raises:
        DistillPipeError: see `errors`; the dataset stays valid, and the same call continues it.
        KeyboardInterrupt: `stopping` became true; likewise.
    """
    root, journal = open_root(job.out), journal or Journal()
    target, spec = prepare(job)
    run = read_run(root)
    if run is None:
        _require_supervision(target, spec, job)
        run = freeze(root, spec, job)
    require_same_run(root, run, spec)
    require_exclusive_create(root)
    for part in run.plan:
        check_file(root, part)
    write_card(root, run)
    committed = committed_flags(root, run)
    restore_fragments(root, run, (shard for shard, done in enumerate(committed) if done))
    left = committed.count(0)
    on_start(run, left)
    if left == 0:
        return run
    engines = min(job.workers, left)
    journal.write("run_started", root=str(root), target=spec.target.name, shards=num_shards(run), shards_left=left,
                  prompts=spec.corpus.prompts, engines=engines)
    watch = _Watch(root, run, job.max_failed_share, journal, on_progress)
    cluster = ClusterPlan(model=target.model, revision=target.revision, workers=engines, address=job.address,
                          engine=job.engine, limits=Limits(job.start_seconds, job.stall_seconds))
    todo = (shard for shard, done in enumerate(committed) if not done)
    with _ended(journal):
        run_on_ray(cluster, run, root, todo, left, watch, journal, stopping)
    return run


class _Watch:
    """Looks into the quarantine of every shard that comes, and ends a run in which too many prompts fail."""

    def __init__(self, root: Root, run: Run, max_failed_share: float, journal: Journal,
                 on_progress: Callable[[Progress], None]) -> None:
        self._root, self._journal, self._on_progress = root, journal, on_progress
        self._allowed = max(1.0, max_failed_share * run.spec.corpus.prompts)
        self._failed = 0

    def __call__(self, progress: Progress) -> None:
        self._on_progress(progress)
        for outcome in progress.outcomes:
            if outcome.fragment is not None:
                self._count(outcome.fragment.info)
        if self._failed > self._allowed:
            raise QuarantineLimitError(f"{self._failed} prompts failed in the engine or in capture; see "
                                       f"{self._root}/_quarantine, and raise max_failed_share to go on")

    def _count(self, info: ShardInfo) -> None:
        for prompt in read_given_up(self._root, info):
            self._failed += prompt.code in FAILED
            self._journal.write("prompt_quarantined", shard=info.shard, ordinal=prompt.ordinal, code=prompt.code,
                                reason=prompt.message)


def _require_supervision(target: Target, spec: RunSpec, job: Job) -> None:
    """Read given responses up to the first that can be supervised, so that a corpus without any starts no engine.

    Raises:
        UsageError: there is none.
    """
    if spec.responses == "target":
        return
    renderer = renderer_for(spec.target, str(target.folder), None, datetime.now(UTC).date())
    reason = ""
    for prompt in read_prompts(job.corpus_files, job.responses, job.limit):
        try:
            renderer.render_fitting(prompt.messages, spec)
        except (TemplateError, TooLongError) as error:
            reason = reason or redacted(str(error)).splitlines()[0]
        else:
            return
    raise UsageError(f"none of {spec.corpus.prompts} conversations has a token to supervise (the first: {reason}); see "
                     "to `weight` and `supervised` of the assistant's turns, and to max_model_len")


@contextmanager
def _ended(journal: Journal) -> Iterator[None]:
    """Write down how a run ended, whatever that was."""
    how: dict[str, str] = {"how": "finished"}
    try:
        yield
    except KeyboardInterrupt:
        how = {"how": "stopped"}
        raise
    except BaseException as error:
        how = {"how": "failed", "class": failure_class(error), "reason": str(error)}
        raise
    finally:
        journal.write("run_ended", **how)


def _check_capture(job: Job, target: Target, capture: CaptureSpec) -> None:
    vocab, limits = target.spec.vocab_size, target.limits
    if capture.top_k > vocab:
        raise UsageError(f"{capture.top_k} head entries are more than the {vocab} tokens of {job.target}'s vocabulary; "
                         "lower --top-k or --top-k-max")
    if capture.layers and not limits.states:
        raise UsageError(f"vLLM delivers no hidden states of {target.spec.architecture}; use --layers none")
    if 0 in capture.layers and not limits.embeddings:
        raise UsageError(f"vLLM cannot deliver layer 0, the embeddings, of {target.spec.architecture}; leave it out of "
                         "--layers")
    if capture.layers and job.engine.pipeline_parallel_size > 1 and not limits.pipelined_states:
        raise UsageError(f"vLLM does not pass hidden states of {target.spec.architecture} on between pipeline stages; "
                         "set engine.pipeline_parallel_size=1 (tensor_parallel_size instead), or --layers none")
    if job.max_model_len is not None and job.max_model_len > target.max_model_len:
        raise UsageError(f"max_model_len {job.max_model_len} is more than the {target.max_model_len} tokens that "
                         f"{job.target} can take")


def freeze(root: Root, spec: RunSpec, job: Job) -> Run:
    """Write plan and run.json of a new run; the plan's names hold its content, so a repeat is harmless.

    Raises:
        UsageError: the place is taken, or the corpus is not what it was when `spec` was made.
    """
    if not root.is_unused():
        # Another driver that was started at the same moment may have been faster.
        if (frozen := read_run(root)) is not None:
            return frozen
        raise UsageError(not_ours(root))
    with root.scratch() as folder:
        plan = []
        for number, shards in enumerate(_parts(spec, job)):
            path = folder / f"part-{number}"
            write_plan_part(path, shards)
            digest = sha256_of(path)
            ref = FileRef(name=f"plan/part-{number:03d}-{digest[:8]}.parquet", sha256=digest, size=path.stat().st_size)
            root.publish(path, ref.name)
            plan.append(ref)
    if corpus_files(job.corpus_files) != spec.corpus.files:
        raise UsageError("the corpus changed while it was read, so no run was started; wait until nobody writes to it")
    run = Run(fingerprint=spec.fingerprint, spec=spec, plan=tuple(plan),
              created_by=f"distill-pipe {distill_pipe.__version__}",
              created_at=datetime.now(UTC).isoformat("T", "seconds"))
    root.create_bytes(encode_record(run), RUN)
    return require_run(root)


def _parts(spec: RunSpec, job: Job) -> Iterator[Iterator[list[PlannedPrompt]]]:
    prompts = read_prompts(job.corpus_files, job.responses, job.limit)
    for first in range(0, spec.num_shards, SHARDS_PER_PART):
        count = min(SHARDS_PER_PART, spec.num_shards - first)
        yield (list(islice(prompts, spec.prompts_per_shard)) for _ in range(count))


def not_ours(root: Root) -> str:
    """Why nothing is written to a folder that holds something else."""
    return f"{root} is not empty and is not a distill-pipe dataset; choose another output folder"
