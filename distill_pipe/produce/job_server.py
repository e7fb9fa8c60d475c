"""The job server of a Ray cluster, by HTTP. Beside `cluster` the one file that imports ray; needs `ray[default]`.

Who the user is comes from where Ray looks for it: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or ~/.ray/auth_token.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from distill_pipe.errors import ClusterError, UsageError
from distill_pipe.produce.submission import JOB_FILE, RUNNING, Submission, Submitted, next_name

POLL_SECONDS: Final = 2.0


class JobServer:
    """The jobs of the cluster whose dashboard is at `address`, for example http://head:8265.

    Raises:
        UsageError: Ray's client for jobs is not installed.
        ClusterError: there is no job server at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise UsageError(f"this needs Ray's client for jobs: pip install 'ray[default]' ({error})") from None
        self._address = address
        with _failures(address):
            self._client: Any = JobSubmissionClient(address)

    def states(self) -> dict[str, str]:
        """The state of every job that the cluster remembers: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        with _failures(self._address):
            return {job.submission_id: str(job.status.value) for job in self._client.list_jobs() if job.submission_id}

    def submit(self, job: Submission) -> Submitted:
        """Start a job unless it runs already.

        Raises:
            ClusterError: the cluster refused it.
        """
        states = self.states()
        name, start = next_name(job.name, states)
        if start:
            self._start(name, job)
        return Submitted(id=name, state=self.state(name) if start else states[name], started=start,
                         entrypoint=job.entrypoint)

    def state(self, name: str) -> str:
        """The state of one job.

        Raises:
            UsageError: there is no such job.
        """
        states = self.states()
        if name not in states:
            raise UsageError(f"{self._address} knows no job {name!r}; it has {', '.join(sorted(states)) or 'none'}")
        return states[name]

    def logs(self, name: str, follow: bool, wait: Callable[[float], None]) -> Iterator[str]:
        """What a job has printed; with `follow` until it ends. Raises as `state`."""
        seen = 0
        while True:
            ended = self.state(name) not in RUNNING
            with _failures(self._address):
                text: str = self._client.get_job_logs(name) or ""
            yield text[seen:]
            seen = len(text)
            if ended or not follow:
                return
            wait(POLL_SECONDS)

    def stop(self, name: str) -> bool:
        """Ask a job to end. False where it had ended before. Raises as `state`."""
        self.state(name)
        with _failures(self._address):
            return bool(self._client.stop_job(name))

    def _start(self, name: str, job: Submission) -> None:
        with tempfile.TemporaryDirectory(prefix="distill-pipe-job-") as folder, _failures(self._address):
            Path(folder, JOB_FILE).write_text(job.text, encoding="utf-8")
            try:
                self._client.submit_job(entrypoint=job.entrypoint, submission_id=name,
                                        runtime_env={"working_dir": folder}, metadata={"job": job.name})
            except RuntimeError:
                # Somebody else may have submitted it since the listing; then it is there.
                if name not in self.states():
                    raise


@contextmanager
def _failures(address: str) -> Iterator[None]:
    """What Ray's client raises, as one line."""
    from ray.exceptions import RayError

    try:
        yield
    except (ClusterError, UsageError):
        raise
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        said = " ".join(str(error).split())[:500]
        raise ClusterError(f"the job server at {address}: {said}; the address is that of Ray's dashboard, for example "
                           "http://head:8265") from error
