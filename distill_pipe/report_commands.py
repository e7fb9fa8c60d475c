"""`report`: a dataset as one page to look at. Like `cli`, which gives it its name, it parses, calls and prints."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from distill_pipe.errors import UsageError
from distill_pipe.options import Json, Root
from distill_pipe.report_tables import say
from distill_pipe.store.disk import storage_failures
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root
from distill_pipe.token_text import token_decoder


def report(
    root: Root,
    html: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("report.html"),
    traces: Annotated[int, typer.Option(min=0, max=12, help="Sample traces to show token by token.")] = 6,
    tokenizer: Annotated[str | None, typer.Option(help="Where to find the tokenizer, when not at the target's name."
                                                  )] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a dataset: the run, its rows, and some traces token by token. It needs no network."""
    from distill_pipe.report.collect import collect
    from distill_pipe.report.page import render

    store = open_root(root)
    facts = collect(store, token_decoder(tokenizer or require_run(store).spec.target.name), traces)
    page = render(facts)
    try:
        with storage_failures(str(html)):
            html.write_text(page, encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError(f"--html {html}: {error.strerror}; give a file in a folder that exists") from None
    say(f"{html}: {len(page.encode()) / 1000:,.0f} kB, {len(facts.viewed)} traces; open it in a browser")
    if as_json:
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
