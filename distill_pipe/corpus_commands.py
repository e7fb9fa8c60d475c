"""`distill-pipe prepare`: a corpus of any shape and place as one local file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from distill_pipe.options import Json, Limit, Responses
from distill_pipe.report_tables import print_facts


def prepare(
    corpus: Annotated[list[str], typer.Argument(help="Files, hf://datasets/..., s3://..., or infinity-instruct.")],
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl, .jsonl.zst, .jsonl.gz or .parquet.")],
    responses: Annotated[Responses, typer.Option(help="Who will write the responses.")] = Responses.target,
    limit: Limit = None,
    split_turns: Annotated[bool, typer.Option("--split-turns", help="One prompt for each turn of the assistant: for "
                                              "targets that leave earlier thoughts out.")] = False,
    as_json: Json = False,
) -> None:
    """Check a corpus and write it as one local file, with domains, tools and thoughts kept."""
    from distill_pipe.produce.normalise import prepare_corpus

    console = Console(stderr=True)
    columns = (SpinnerColumn(), "prompts", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("prompts", total=limit)
        found = prepare_corpus(corpus, out, responses.value, limit, split_turns, lambda: bar.advance(task))
    print_facts(found, as_json)
