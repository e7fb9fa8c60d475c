"""The options of the command line that several commands share, or that name one of a fixed set.

One option per setting that people change most; the rest of a job is `--set`. Commands that describe a job share theirs.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_pipe.errors import UsageError

if TYPE_CHECKING:
    from distill_pipe.produce.job import Job

Root = Annotated[str, typer.Argument(help="The dataset's folder, or its address in an object store.",
                                    metavar="DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


class Responses(StrEnum):
    target = "target"
    corpus = "corpus"


class HiddenCodecs(StrEnum):
    f32 = "f32"
    bf16 = "bf16"
    bf16_split = "bf16-split"
    fp8 = "fp8"
    q8 = "q8"
    q6 = "q6"
    q5 = "q5"


class Losses(StrEnum):
    kl = "kl"
    reverse_kl = "reverse-kl"
    tv = "tv"
    lk_alpha = "lk-alpha"
    lk_hybrid = "lk-hybrid"
    expected_length = "expected-length"


class TailRules(StrEnum):
    sampled = "sampled"
    drop = "drop"
    bucket = "bucket"
    exact = "exact"


class Arch(StrEnum):
    eagle3 = "eagle3"
    medusa = "medusa"
    mlp_speculator = "mlp_speculator"
    mtp = "mtp"


class Precisions(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


Target = Annotated[str | None, typer.Option(help="A known target, a local folder, or a hub id.")]
Corpus = Annotated[list[str] | None, typer.Option(help="JSONL (.gz, .zst) or Parquet: a file, hf://datasets/..., "
                                                       "s3://..., or infinity-instruct; may be repeated.")]
Out = Annotated[str | None, typer.Option(help="The dataset's folder or address; an existing run is continued.")]
Writer = Annotated[Responses | None, typer.Option(help="Who writes the responses: target (default) or corpus.")]
TopK = Annotated[int | None, typer.Option(help="Head entries per row [32].")]
Coverage = Annotated[float | None, typer.Option(help="As many head entries per row as hold this share of the "
                                                     "probability, in place of --top-k.")]
TopKMax = Annotated[int | None, typer.Option(help="The most head entries that a row may have with --coverage [256].")]
TailSamples = Annotated[int | None, typer.Option(help="Samples of the tail per row [8].")]
Layers = Annotated[str | None, typer.Option(help="Hidden states to keep: 3+last, last, none, or numbers like "
                                                 "2,15,27,last [the target's default].")]
Codec = Annotated[HiddenCodecs | None, typer.Option(help="How hidden states are stored [bf16-split].")]
Gpus = Annotated[str | None, typer.Option(help="The GPUs at hand, e.g. 8xH200: picks the engines' layout and number.")]
Workers = Annotated[int | None, typer.Option(help="Engines to run [1].")]
Limit = Annotated[int | None, typer.Option(help="Take only the first N prompts.")]
TargetFolder = Annotated[str | None, typer.Option("--target", help="The target's folder, when its name does not lead "
                                                                   "there.")]
JobFile = Annotated[Path | None, typer.Option(help="A job file (YAML); options go over it.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting of the job, e.g. "
                                                                  "sampling.max_tokens=64.")]


def described_job(given: Mapping[str, Any], needs_out: bool = True) -> "Job":
    """The job that a command's parameters, by name, describe."""
    from distill_pipe.produce.job import load_job

    plain = {name: str(value) if isinstance(value, StrEnum) else value for name, value in given.items()}
    plain |= {"corpus": given["corpus"] or None}
    options = {name: plain.get(name) for name in ("target", "corpus", "out", "responses", "limit", "workers", "gpus")}
    options |= {f"capture.{name}": plain[name] for name in ("top_k", "coverage", "top_k_max", "tail_samples",
                                                            "hidden_codec", "layers")}
    return load_job(given["job"], given["set_"] or (), options, needs_out=needs_out)


def layer_numbers(text: str | None) -> list[int] | None:
    """The numbers of `--layers`; none of them for `none`."""
    if text is None:
        return None
    if text.strip() == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--layers {text}: write numbers with commas, for example 2,15,27,30, or none") from None
