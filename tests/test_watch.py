"""`status --watch`: what it shows, and that it ends with the run."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from runs import command
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.status_commands import WINDOW_SECONDS, Pace, watch_run, watch_table
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import open_root
from distill_pipe.store.status import status


@pytest.mark.parametrize("terminal", [False, True])
def test_a_watched_run_is_shown_shard_by_shard_until_it_is_complete(tmp_path: Path, terminal) -> None:
    root = open_root(str(tmp_path / "run"))
    run = start_run(tmp_path / "run", 10, Shape(prompts_per_shard=4))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, legacy_windows=False)
    todo = [0, 1, 2]

    def commit_one() -> None:
        shard = todo.pop(0)
        commit_shard(root, run, shard, [encode_trace(random_trace(i), "bf16-split")
                                        for i in range(*shard_range(run, shard))], [])

    watch_run(root, console, commit_one)
    assert todo == []
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    for done in range(4):
        assert re.search(rf"{done} of 3\b" if terminal else rf"{done}/3 shards", shown), shown
    assert ("complete" in shown) == terminal


def test_without_a_terminal_only_what_changed_is_printed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "run", 4)
    done = command("status", tmp_path / "run", "--watch")
    assert done.returncode == 0
    assert re.fullmatch(r"1/1 shards, 4 traces, [\d,]+ tokens, 0 prompts given up on\n", done.stdout)
    refused = command("status", tmp_path / "run", "--watch", "--json")
    assert (refused.returncode, "call `status --json`" in refused.stderr) == (2, True)


def test_the_pace_is_that_of_the_last_minutes() -> None:
    pace = Pace()
    pace.note(0.0, 100)
    assert pace.tokens_per_second is None
    pace.note(10.0, 100)
    assert pace.tokens_per_second is None
    pace.note(20.0, 300)
    assert pace.tokens_per_second == 10
    pace.note(20.0 + WINDOW_SECONDS, 300)
    assert pace.tokens_per_second is None


def test_the_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    make_dataset(tmp_path / "run", 4)
    console = Console(file=io.StringIO(), width=80)
    console.print(watch_table(status(open_root(str(tmp_path / "run"))), 1234.5))
    shown = console.file.getvalue()
    assert "1,234 tokens/s" in shown or "1,235 tokens/s" in shown
    assert max(map(len, shown.splitlines())) <= 80
