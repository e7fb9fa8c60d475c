"""The command line: parse, call, print. Facts go to stdout, progress and errors to stderr; see `errors` for exit codes.

Commands import what they need when they run, so that `status` and `verify` work without an engine or torch installed.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from distill_pipe.errors import DistillPipeError, UsageError
from distill_pipe.export_commands import export
from distill_pipe.hub_commands import pull, push
from distill_pipe.measure_commands import audit, bench_capture, plan
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
    TopK,
    TopKMax,
    Workers,
    Writer,
    described_job,
)
from distill_pipe.redact import redacted
from distill_pipe.report_commands import report
from distill_pipe.report_tables import print_facts, print_forecast, print_statistics, print_trace, say, visible
from distill_pipe.stopping import StopRequest
from distill_pipe.store.inspect import inspect_trace
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import open_root
from distill_pipe.store.status import status as read_status
from distill_pipe.store_commands import doctor, gc, selftest, verify
from distill_pipe.targets_commands import targets
from distill_pipe.token_text import token_decoder
from distill_pipe.train_commands import bench_draft, evaluate, train

if TYPE_CHECKING:
    from distill_pipe.produce.job import Job
    from distill_pipe.store.manifest import Run

_STOP = StopRequest()
app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Offline target distillation for speculative decoding.")


@app.command()
def generate(  # noqa: PLR0913 - the options above
    target: Target = None, corpus: Corpus = None, out: Out = None, responses: Writer = None, top_k: TopK = None,
    coverage: Coverage = None, top_k_max: TopKMax = None, tail_samples: TailSamples = None, layers: Layers = None,
    hidden_codec: Codec = None, gpus: Gpus = None, workers: Workers = None, limit: Limit = None, job: JobFile = None,
    set_: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, like plan.")] = False,
    log_json: Annotated[Path | None, typer.Option("--log-json", help="Append what happens to this file, as JSON lines."
                                                  )] = None,
    as_json: Json = False,
) -> None:
    """Run a target over a corpus and store what a draft learns from. Continues where an earlier run stopped."""
    described = described_job(locals())
    if dry_run:
        from distill_pipe.produce.forecast import forecast

        print_forecast(forecast(described), as_json)
        return
    _generate(described, as_json, log_json)


app.command()(plan)
app.add_typer(targets, name="targets")


@app.command()
def status(root: Root, as_json: Json = False) -> None:
    """How far a run is. Needs no engine and no Ray."""
    print_facts(read_status(open_root(root)), as_json)


app.command()(verify)


@app.command()
def finalize(root: Root, as_json: Json = False) -> None:
    """Sum up a complete dataset: manifest, statistics, token frequencies, and the mark that it is complete."""
    from distill_pipe.store.finalize import finalize as finalize_dataset

    print_statistics(finalize_dataset(open_root(root)), as_json)


@app.command()
def inspect(
    root: Root,
    trace: Annotated[int, typer.Option(help="The prompt's ordinal.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Where to find the tokenizer, when not at the target's name."
                                                  )] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Head entries to show per row.")] = 3,
    as_json: Json = False,
) -> None:
    """Show one trace: tokens, loss mask, the target's likeliest next tokens, and the mass outside the head."""
    rows, run = inspect_trace(open_root(root), trace, candidates)
    if as_json:
        sys.stdout.write(msgspec.json.encode(rows).decode() + "\n")
        return
    decode = token_decoder(tokenizer or run.spec.target.name)
    print_trace(rows, lambda token: visible(decode(token)), trace)


app.command()(report)
app.command()(gc)
app.command()(selftest)
app.command()(doctor)
app.command()(train)
app.command()(evaluate)
app.command("bench-draft")(bench_draft)
app.command()(push)
app.command()(pull)
app.command()(audit)
app.command()(export)
app.command("bench-capture")(bench_capture)


def main() -> None:
    """The console script: failures of ours end in one message and their exit code."""
    _STOP.install()
    try:
        app()
    except DistillPipeError as error:
        say(f"error: {redacted(str(error))}")
        sys.exit(error.exit_code)
    except PermissionError as error:
        say(f"error: {error.filename}: {error.strerror}; choose another folder, or change its permissions")
        sys.exit(UsageError.exit_code)


def _generate(job: "Job", as_json: bool, log_json: Path | None) -> None:
    from distill_pipe.produce.generate import generate as run_job
    from distill_pipe.produce.journal import Journal
    from distill_pipe.produce.progress import RunMeter

    meter = RunMeter(Console(stderr=True))
    with ExitStack() as stack:

        def start(run: "Run", shards_left: int) -> None:
            stack.enter_context(_STOP.patiently())
            stack.enter_context(meter.running(run, shards_left))

        try:
            run = run_job(job, start, meter.update, stack.enter_context(Journal(log_json)), _STOP.asked)
        except KeyboardInterrupt:
            stack.close()
            say(f"{'terminated' if _STOP.terminated else 'interrupted'}; the same command continues the run")
            raise typer.Exit(_STOP.exit_code) from None
    store = open_root(job.out)
    facts = read_status(store)
    if as_json:
        print_facts(facts, as_json)
        return
    per_token = facts.bytes / max(facts.tokens, 1)
    say(f"{job.out}: {facts.traces} traces, {facts.rows} rows, {facts.tokens} tokens, {per_token:,.0f} bytes per token"
         f", {facts.quarantined} prompts quarantined; {len(meter.shards)} of {num_shards(run)} shards made by this "
         f"call in {meter.seconds:,.0f} s")




if __name__ == "__main__":
    main()
