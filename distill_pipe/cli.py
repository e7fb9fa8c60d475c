"""The command line: parse, call, print. Facts go to stdout, progress and errors to stderr; see `errors` for exit codes.

Commands import what they need when they run, so that `status` and `verify` work without an engine or torch installed.
"""

import errno
import io
import sys
import traceback
from types import TracebackType
from typing import Annotated

import msgspec
import typer

import distill_pipe
from distill_pipe.corpus_commands import prepare
from distill_pipe.errors import DistillPipeError, UsageError
from distill_pipe.export_commands import export
from distill_pipe.hub_commands import pull, push
from distill_pipe.job_commands import cancel, logs, submit
from distill_pipe.measure_commands import audit, bench_capture, plan
from distill_pipe.options import Json, Root
from distill_pipe.redact import redacted
from distill_pipe.report_commands import report
from distill_pipe.report_tables import print_statistics, print_trace, say, visible
from distill_pipe.run_commands import STOP, generate, retry_quarantine
from distill_pipe.status_commands import status
from distill_pipe.store.disk import shut_out_strangers, storage_failures
from distill_pipe.store.inspect import inspect_trace
from distill_pipe.store.root import open_root
from distill_pipe.store_commands import doctor, gc, selftest, verify
from distill_pipe.targets_commands import targets
from distill_pipe.token_text import token_decoder
from distill_pipe.train_commands import bench_draft, evaluate, train

# What a file system answers to a path that this user cannot use.
_REFUSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
# What brings the packages that not every command needs.
_ENGINE = "'distill-pipe[cuda]', or 'distill-pipe[cpu]' where there is no GPU"
_EXTRAS = {"torch": "'distill-pipe[train]'", "safetensors": "'distill-pipe[train]'",
           "transformers": "'distill-pipe[audit]'", "ray": _ENGINE, "vllm": _ENGINE}
app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"distill-pipe {distill_pipe.__version__}\n")
        raise typer.Exit


@app.callback()
def options(_version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                                  help="Show the version and exit.")] = False) -> None:
    """Offline target distillation for speculative decoding."""


def finalize(root: Root, as_json: Json = False) -> None:
    """Sum up a complete dataset: manifest, statistics, token frequencies, and the mark that it is complete."""
    from distill_pipe.store.finalize import finalize as finalize_dataset

    print_statistics(finalize_dataset(open_root(root)), as_json)


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


# Before a run.
app.add_typer(targets, name="targets")
app.command()(plan)
app.command()(prepare)
app.command()(selftest)
app.command()(doctor)
# A run.
app.command()(generate)
app.command()(submit)
app.command()(logs)
app.command()(cancel)
app.command()(status)
app.command("retry-quarantine")(retry_quarantine)
# A dataset.
app.command()(verify)
app.command()(finalize)
app.command()(gc)
app.command()(inspect)
app.command()(report)
app.command()(audit)
app.command()(push)
app.command()(pull)
app.command()(export)
# A draft, and capture.
app.command()(train)
app.command()(evaluate)
app.command("bench-draft")(bench_draft)
app.command("bench-capture")(bench_capture)


def main() -> None:
    """The console script: failures of ours end in one message and their exit code. What is printed of any failure may
    quote secrets, which are taken out."""
    sys.excepthook = _print_bug
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text of a corpus or a target may hold what this terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    STOP.install()
    shut_out_strangers()
    try:
        with storage_failures("disk"):
            app()
    except DistillPipeError as error:
        say(f"error: {redacted(str(error))}")
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        say(f"error: this needs {error.name}, which is not installed: pip install {_EXTRAS[error.name]}")
        sys.exit(UsageError.exit_code)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        say(f"error: {error.filename}: {error.strerror}; choose another place, or change its permissions")
        sys.exit(UsageError.exit_code)


def _print_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say(redacted("".join(traceback.format_exception(kind, error, trace)).rstrip()))


if __name__ == "__main__":
    main()
