"""The commands that run an engine: `generate`, and `retry-quarantine` for what a run gave up on.

Like `cli`, which gives them their names, they parse, call and print; each imports what it needs when it runs.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from distill_pipe.errors import QuarantineLimitError
from distill_pipe.options import (
    Codec,
    Corpus,
    Coverage,
    Gpus,
    JobFile,
    Json,
    Layers,
    Limit,
    Out,
    Root,
    Settings,
    TailSamples,
    Target,
    TargetFolder,
    TopK,
    TopKMax,
    Workers,
    Writer,
    described_job,
)
from distill_pipe.report_tables import print_facts, print_forecast, say
from distill_pipe.stopping import StopRequest
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.plan import num_shards
from distill_pipe.store.quarantine import quarantined_prompts
from distill_pipe.store.root import open_root
from distill_pipe.store.status import status as read_status

if TYPE_CHECKING:
    from distill_pipe.produce.job import Job
    from distill_pipe.store.manifest import Run
    from distill_pipe.store.root import Root as Store

STOP = StopRequest()
LogJson = Annotated[Path | None, typer.Option("--log-json", help="Append what happens to this file, as JSON lines.")]


def generate(  # noqa: PLR0913 - the options above
    target: Target = None, corpus: Corpus = None, out: Out = None, responses: Writer = None, top_k: TopK = None,
    coverage: Coverage = None, top_k_max: TopKMax = None, tail_samples: TailSamples = None, layers: Layers = None,
    hidden_codec: Codec = None, gpus: Gpus = None, workers: Workers = None, limit: Limit = None, job: JobFile = None,
    set_: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, like plan.")] = False,
    log_json: LogJson = None, as_json: Json = False,
) -> None:
    """Run a target over a corpus and store what a draft learns from. Continues where an earlier run stopped."""
    described = described_job(locals())
    if dry_run:
        from distill_pipe.produce.forecast import forecast

        print_forecast(forecast(described), as_json)
        return
    run(described, as_json, log_json)


def retry_quarantine(
    root: Root,
    out: Annotated[str, typer.Option(help="The new dataset's folder or address; an existing one is continued.")],
    every: Annotated[bool, typer.Option("--all", help="Also prompts that the corpus is to blame for: too long, or "
                                                      "refused by the chat template.")] = False,
    target: TargetFolder = None, workers: Workers = None, set_: Settings = None, log_json: LogJson = None,
    as_json: Json = False,
) -> None:
    """Run the prompts that a run gave up on again, with its settings, into a dataset of their own."""
    from distill_pipe.produce.retry import retry_job

    with tempfile.TemporaryDirectory(prefix="distill-pipe-retry-") as folder:
        options: dict[str, object] = {"target": target, "out": out, "workers": workers}
        run(retry_job(open_root(root), Path(folder), set_ or (), options, every=every), as_json, log_json)


def run(job: "Job", as_json: bool, log_json: Path | None) -> None:
    """Run a job and say what came of it."""
    from distill_pipe.produce.generate import generate as run_job
    from distill_pipe.produce.journal import Journal
    from distill_pipe.produce.progress import RunMeter

    meter = RunMeter(Console(stderr=True))
    with ExitStack() as stack:

        def start(run: "Run", shards_left: int) -> None:
            stack.enter_context(STOP.patiently())
            stack.enter_context(meter.running(run, shards_left))

        try:
            done = run_job(job, start, meter.update, stack.enter_context(Journal(log_json)), STOP.asked)
        except KeyboardInterrupt:
            stack.close()
            say(f"{'terminated' if STOP.terminated else 'interrupted'}; the same command continues the run")
            raise typer.Exit(STOP.exit_code) from None
    store = open_root(job.out)
    facts = read_status(store)
    if facts.traces == 0:
        _require_a_trace(store, done)
    if as_json:
        print_facts(facts, as_json)
        return
    per_token = facts.bytes / max(facts.tokens, 1)
    say(f"{job.out}: {facts.traces} traces, {facts.rows} rows, {facts.tokens} tokens, {per_token:,.0f} bytes per token"
         f", {facts.quarantined} prompts quarantined; {meter.shards} of {num_shards(done)} shards made by this "
         f"call in {meter.seconds:,.0f} s")


def _require_a_trace(store: "Store", run: "Run") -> None:
    """Raises:
        QuarantineLimitError: every prompt was given up on.
    """
    if any(shard_fragment(store, run, shard).info.traces for shard in committed_shards(store)):
        return
    _, first = next(quarantined_prompts(store, run, None))
    raise QuarantineLimitError(f"{store} holds nothing to train on: all {run.spec.corpus.prompts} prompts were given "
                               f"up on (the first: {first.message.splitlines()[0]})")
