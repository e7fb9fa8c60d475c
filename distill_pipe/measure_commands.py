"""The commands that measure and change nothing: what a run and capture will cost, and whether stored rows are right.

Like `cli`, which gives them their names, they parse, call and print; each imports what it needs when it runs.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from distill_pipe.errors import AuditError, UsageError
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
    Precisions,
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
from distill_pipe.report_tables import print_audit, print_forecast, print_gauge, say
from distill_pipe.store.root import open_root


def plan(  # noqa: PLR0913 - the options above
    target: Target = None, corpus: Corpus = None, out: Out = None, responses: Writer = None, top_k: TopK = None,
    coverage: Coverage = None, top_k_max: TopKMax = None, tail_samples: TailSamples = None, layers: Layers = None,
    hidden_codec: Codec = None, gpus: Gpus = None, workers: Workers = None, limit: Limit = None, job: JobFile = None,
    set_: Settings = None,
    probe: Annotated[int, typer.Option(min=0, help="Really run N prompts in a temporary folder and measure.")] = 0,
    sample: Annotated[int, typer.Option(min=1, help="Prompts to tokenise for the counts.")] = 512,
    gpu_memory: Annotated[float | None, typer.Option(min=0, help="The GPU's memory in GiB, if it is not here.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will cost: tokens, bytes, memory, and with --probe hours. Refuses what does not fit."""
    from distill_pipe.produce.forecast import forecast

    described = described_job(locals(), needs_out=probe > 0)
    if probe:
        say(f"running {probe} prompts in a temporary folder; starting the engine")
    print_forecast(forecast(described, sample=sample, probe=probe, gpu_memory=gpu_memory), as_json)


def audit(
    root: Root,
    traces: Annotated[int, typer.Option(help="Traces to replay, spread evenly over the dataset.")] = 16,
    dtype: Annotated[Precisions, typer.Option(help="Replay in this dtype.")] = Precisions.float32,
    target: TargetFolder = None,
    max_logprob_error: Annotated[float | None, typer.Option(min=0, help=(
        "Largest mean error of a stored number beyond rounding, in nats [0.001; 0.25 with bfloat16]."))] = None,
    max_hidden_error: Annotated[float | None, typer.Option(min=0, help=(
        "Largest mean relative error of a layer beyond its codec [0.001; 0.05 with bfloat16]."))] = None,
    as_json: Json = False,
) -> None:
    """Replay some traces through Hugging Face transformers and compare. Ends in 8 beyond a limit."""
    try:
        from distill_pipe.produce.audit import Limits, audit_dataset
    except ImportError as error:
        raise UsageError(f"audit needs torch and transformers: {error}") from None
    report = audit_dataset(open_root(root), traces, dtype.value, target, Limits(max_logprob_error, max_hidden_error),
                           lambda found: say(f"replaying {found} traces in {dtype.value}"))
    print_audit(report, as_json)
    if report.exceeded:
        raise AuditError(f"{root}: {'; '.join(report.exceeded)}")


def bench_capture(  # noqa: PLR0913 - the options of generate
    target: Target = None, corpus: Corpus = None, responses: Writer = None, top_k: TopK = None,
    coverage: Coverage = None, top_k_max: TopKMax = None, tail_samples: TailSamples = None, layers: Layers = None,
    hidden_codec: Codec = None, limit: Limit = None, job: JobFile = None, set_: Settings = None,
    prompts: Annotated[int, typer.Option(min=1, help="Made-up prompts, where no corpus is given.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times to run everything, with capture and without.")] = 3,
    as_json: Json = False,
) -> None:
    """Run the same requests with capture and without, in one engine: tokens per second, and where the time goes."""
    from distill_pipe.produce.gauge import gauge_capture, questions_corpus

    with tempfile.TemporaryDirectory(prefix="distill-pipe-gauge-") as folder:
        asked = {**locals(), "out": folder, "workers": None}
        if not corpus and job is None:
            asked["corpus"] = [str(questions_corpus(Path(folder, "questions.jsonl"), prompts))]
        described = described_job(asked)
        say(f"running {rounds} rounds with capture and without; starting the engine")
        # The engine runs in this process, and what it prints is not the command's output.
        with redirect_stdout(sys.stderr):
            found = gauge_capture(described, rounds)
    print_gauge(found, as_json)
