"""`status`: how far a run is, from its dataset alone, once or until it is complete."""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from distill_pipe.errors import UsageError
from distill_pipe.options import Json, Root
from distill_pipe.report_tables import print_facts
from distill_pipe.store.root import Root as StoreRoot
from distill_pipe.store.root import open_root
from distill_pipe.store.status import Status
from distill_pipe.store.status import status as read_status

# Commits come in bursts, one per worker: a shorter window would show their rhythm.
WINDOW_SECONDS: Final = 300.0


def status(
    root: Root,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show a live table until the run is complete.")] = False,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks with --watch.")] = 5.0,
    as_json: Json = False,
) -> None:
    """How far a run is. Needs no engine and no Ray."""
    if watch and as_json:
        raise UsageError("--watch is for people and --json for scripts: call `status --json` as often as you like")
    if not watch:
        print_facts(read_status(open_root(root)), as_json)
        return
    watch_run(open_root(root), Console(), lambda: time.sleep(every))


def watch_run(root: StoreRoot, console: Console, wait: Callable[[], None]) -> None:
    """Show how far a run is, again and again, until it is complete; where there is no terminal, a line whenever a shard
    was committed."""
    pace, shown = Pace(), -1
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = read_status(root)
            pace.note(time.monotonic(), found.tokens)
            if console.is_terminal:
                live.update(watch_table(found, pace.tokens_per_second), refresh=True)
            elif found.shards_done != shown:
                console.print(f"{found.shards_done}/{found.shards} shards, {found.traces:,} traces, {found.tokens:,} "
                              f"tokens, {found.quarantined:,} prompts given up on", highlight=False)
            shown = found.shards_done
            if found.complete:
                return
            wait()


class Pace:
    """Tokens per second over the last minutes of looking."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def note(self, moment: float, tokens: int) -> None:
        """Take in a look; those older than the window are forgotten."""
        self._looks.append((moment, tokens))
        while self._looks[0][0] < moment - WINDOW_SECONDS:
            self._looks.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """None until something was committed between two looks."""
        (first, before), (last, after) = self._looks[0], self._looks[-1]
        return (after - before) / (last - first) if last > first and after > before else None


def watch_table(found: Status, tokens_per_second: float | None) -> Table:
    """One look at a run."""
    table = Table(show_header=False, box=None, title=f"{found.target}  {found.fingerprint[:12]}", title_justify="left")
    table.add_column(justify="right", style="dim")
    table.add_column()
    table.add_row("shards", ProgressBar(total=max(found.shards, 1), completed=found.shards_done, width=40))
    rate = "-" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"
    eta = "-" if found.eta_seconds is None else str(timedelta(seconds=round(found.eta_seconds)))
    mass = "-" if found.tail_mass_mean is None else f"{found.tail_mass_mean:.4f}"
    for name, value in (
            ("", f"{found.shards_done:,} of {found.shards:,}"),
            ("left", "complete" if found.complete else eta), ("now", rate),
            ("traces", f"{found.traces:,} of {found.prompts:,} prompts"), ("tokens", f"{found.tokens:,}"),
            ("rows", f"{found.rows:,}"), ("on disk", f"{found.bytes / 1e6:,.1f} MB"),
            ("outside the head", mass), ("given up on", f"{found.quarantined:,}")):
        table.add_row(name, value)
    return table
