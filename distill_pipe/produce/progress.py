"""How a run is shown while it goes: a rich bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill_pipe.produce.worker import Progress as Step
from distill_pipe.store.manifest import Fragment, Run

# A line without news, and one with: many small shards are not a line each.
LOG_SECONDS, SHARD_SECONDS = 10.0, 1.0


class RunMeter:
    """Counts what a run does and says so. Bytes are those on disk of the shards committed so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._logged = time.monotonic()
        self._engine_up: float | None = None
        self._bar: Progress | None = None
        self.prompts = self.tokens = self.rows = self.bytes = self.quarantined = self.total = 0
        self.shards = 0
        self.shards_left = 0

    @contextmanager
    def running(self, run: Run, shards_left: int) -> Iterator[None]:
        """Show progress while the body runs."""
        per_shard = run.spec.prompts_per_shard
        self.total = min(shards_left * per_shard, run.spec.corpus.prompts)
        self.shards_left = shards_left
        if shards_left == 0:
            yield
            return
        if not self._console.is_terminal:
            self._console.print(f"{shards_left} shards to do, about {self.total} prompts; starting the engine",
                                highlight=False)
            yield
            return
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"),
                             TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                             console=self._console, transient=False)
        with self._bar:
            self._bar.add_task("starting the engine", total=self.total, facts="")
            yield

    def update(self, step: Step) -> None:
        """Take in one step of a run."""
        self._engine_up = self._engine_up or time.monotonic()
        self.prompts += step.prompts
        self.tokens += step.tokens
        for outcome in step.outcomes:
            if outcome.fragment is not None:
                self._count(outcome.fragment)
        if self._bar is not None:
            task = self._bar.tasks[0]
            self._bar.update(task.id, completed=self.prompts, description="generating" if self.prompts else
                             task.description, facts=self.facts())
        elif time.monotonic() - self._logged > (SHARD_SECONDS if step.outcomes else LOG_SECONDS):
            self._logged = time.monotonic()
            self._console.print(f"{self.prompts}/{self.total} prompts, {self.shards}/{self.shards_left} shards, "
                                f"{self.facts()}{self._eta()}", highlight=False)

    def facts(self) -> str:
        """Tokens per second since the first engine answered, and bytes on disk per supervised row."""
        rate = self.tokens / max(self._running_seconds(), 1.0)
        size = f", {self.bytes / self.rows:,.0f} B/row" if self.rows else ""
        return f"{rate:,.0f} tokens/s{size}"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _running_seconds(self) -> float:
        return 0.0 if self._engine_up is None else time.monotonic() - self._engine_up

    def _eta(self) -> str:
        if not self.prompts:
            return ""
        left = (self.total - self.prompts) * self._running_seconds() / self.prompts
        return f", {left:,.0f} s left"

    def _count(self, fragment: Fragment) -> None:
        info = fragment.info
        self.shards += 1
        self.rows += info.rows
        self.quarantined += info.quarantined
        self.bytes += fragment.file.size + sum(ref.size for ref in (info.hidden, info.quarantine) if ref is not None)
