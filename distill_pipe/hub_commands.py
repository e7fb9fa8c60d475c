"""`push` and `pull`: a dataset to the Hugging Face Hub and back. Like `cli`, which names them, they parse, call, print.

Who the user is comes from `hf auth login` or HF_TOKEN, and never from the command line, where others can see it.
"""

from typing import Annotated

import typer

from distill_pipe.errors import UsageError
from distill_pipe.options import Json, Root
from distill_pipe.report_tables import print_facts, say
from distill_pipe.store.root import open_root

Repo = Annotated[str, typer.Argument(help="The repository, owner/name.", metavar="REPO")]


def push(
    root: Root,
    repo: Repo,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    as_json: Json = False,
) -> None:
    """Send a dataset to the Hub. Stopped or not, the same command sends what is missing, and nothing twice."""
    try:
        from distill_pipe.hub.push import push as push_dataset
        from distill_pipe.hub.remote import Repository
    except ImportError as error:
        raise UsageError(f"push needs huggingface_hub: {error}") from None
    done = push_dataset(open_root(root), Repository(repo), private=not public,
                        on_commit=lambda here, all_: say(f"{repo}: {here} of {all_} shards"))
    print_facts(done, as_json)


def pull(
    repo: Repo,
    root: Root,
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch [main].")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a dataset from the Hub and check every file. Stopped or not, the same command fetches what is missing."""
    try:
        from distill_pipe.hub.pull import pull as pull_dataset
        from distill_pipe.hub.remote import Repository
    except ImportError as error:
        raise UsageError(f"pull needs huggingface_hub: {error}") from None
    done = pull_dataset(Repository(repo), open_root(root), revision=revision,
                        on_part=lambda part, files: say(f"{repo}: {files} files of {part}"))
    print_facts(done, as_json)
