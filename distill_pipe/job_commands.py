"""`submit`, `logs` and `cancel`: jobs on a Ray cluster that is elsewhere. Like `cli`, they parse, call and print.

How far a job is comes from its dataset alone: `status`.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from distill_pipe.options import Json, Settings
from distill_pipe.report_tables import print_facts, say

Address = Annotated[str, typer.Option(help="The cluster's dashboard, e.g. http://head:8265.", envvar="RAY_ADDRESS")]
JobId = Annotated[str, typer.Argument(help="The job's id, as submit prints it.", metavar="ID")]


def submit(
    job: Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml")],
    address: Address,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Run a job file on a cluster. Submitted again while it runs, it is the same job; once it ended, it continues."""
    from distill_pipe.produce.job_server import JobServer
    from distill_pipe.produce.submission import read_submission

    described = read_submission(job, set_ or ())
    done = JobServer(address).submit(described)
    if as_json:
        print_facts(done, as_json)
        return
    sys.stdout.write(f"{done.id}\n")
    say(f"{'submitted' if done.started else 'already there'}: {done.state}; `distill-pipe logs {done.id} --follow "
        f"--address {address}` shows it")


def logs(
    id_: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """What a submitted job has printed."""
    from distill_pipe.produce.job_server import JobServer

    server = JobServer(address)
    for text in server.logs(id_, follow, time.sleep):
        sys.stdout.write(text)
        sys.stdout.flush()
    say(f"{id_}: {server.state(id_)}")


def cancel(id_: JobId, address: Address) -> None:
    """End a submitted job. What it committed stays; submitting it again continues it."""
    from distill_pipe.produce.job_server import JobServer

    stopped = JobServer(address).stop(id_)
    say(f"{id_}: {'asked to end' if stopped else 'had ended before'}")
