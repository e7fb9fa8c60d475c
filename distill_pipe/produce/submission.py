"""A job file, sent to a cluster that is elsewhere: what is sent, and under which name.

The name is made of what the job writes, so that submitting it twice, from two laptops or after a lost answer, is one
job. Resources are no part of it: the same job with more workers is the same job. One that has ended is started again
under the next number, since a cluster takes no name twice; `generate` then continues where it stopped. The trade-off:
the job file is sent as it is, and nothing else: the corpus must lie where the cluster can read it.
"""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from distill_pipe.errors import UsageError
from distill_pipe.produce.job import Job, load_job

JOB_FILE: Final = "job.yaml"
RUNNING: Final = ("PENDING", "RUNNING")
# What may differ at every start and leaves the dataset as it is.
_RESOURCES: Final = ("workers", "address", "gpus", "engine", "max_failed_share", "start_seconds", "stall_seconds")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to send: the text of its file, the settings over it, and what it is called."""

    name: str
    text: str
    settings: tuple[str, ...]

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs, in the folder that holds the job file."""
        line = ["python", "-m", "distill_pipe.cli", "generate", "--job", JOB_FILE]
        return shlex.join([*line, *(part for setting in self.settings for part in ("--set", setting)),
                           "--set", "address=auto"])


class Submitted(Struct, frozen=True, kw_only=True):
    """A job on the cluster. `started` is false where it was running already."""

    id: str
    state: str
    started: bool
    entrypoint: str


def read_submission(file: Path, settings: Sequence[str]) -> Submission:
    """Check a job file and name it.

    Raises:
        UsageError: the job is not valid, or its paths mean nothing on another machine.
    """
    job = load_job(file, settings, {})
    _require_shared_paths(job)
    plain = msgspec.to_builtins(job)
    identity = {name: value for name, value in plain.items() if name not in _RESOURCES}
    digest = hashlib.sha256(msgspec.json.encode(identity, order="sorted")).hexdigest()
    return Submission(f"distill-pipe-{digest[:16]}", file.read_text(encoding="utf-8"), tuple(settings))


def next_name(name: str, states: Mapping[str, str]) -> tuple[str, bool]:
    """The name under which a job runs, or is to be started; the second is whether it must be. `states` are those of the
    cluster's jobs by name."""
    attempts = [name, *(f"{name}-{n}" for n in range(2, len(states) + 2))]
    taken = [attempt for attempt in attempts if attempt in states]
    if taken and states[taken[-1]] in RUNNING:
        return taken[-1], False
    return next(attempt for attempt in attempts if attempt not in states), True


def _require_shared_paths(job: Job) -> None:
    """A relative path, or one of a file that only this machine has, would be found missing hours later."""
    for path in (*map(str, job.corpus_files), job.out):
        local = "://" not in path and not path.startswith(("hf:", "/"))
        if local and (path == job.out or Path(path).exists()):
            raise UsageError(f"{path} is a path of this machine: a job to submit needs absolute paths that every node "
                             "can read, or addresses in an object store")
