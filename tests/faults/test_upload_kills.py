"""F06, F07: SIGKILL in the middle of an upload, when a random part of a random request has reached the server.

Catches an object that is partial, a shard that counts as done and is not, and one that is done twice. An upload that
was in parts leaves parts that no listing shows. `make test` kills six times, `make faults` sixty.
"""

import os
import random
import signal
import time
from collections import Counter

import pytest
from tiny_datasets import Shape, make_dataset, start_run

from distill_pipe.store.root import open_root
from distill_pipe.store.verify import verify
from faults.attempts import Attempts
from faults.proxy import Fault, Head, Proxy
from faults.seaweed import Seaweed

PROMPTS = 4
SHAPE = Shape(hidden_size=16384, hidden_codec="f32")
# The sidecar has some 8 MB: in one piece, or in parts of the least size that S3 takes.
PARTS = {"F06 in one piece": 64 << 20, "F07 in parts": 5 << 20}


def is_upload(head: Head) -> bool:
    return head.method in ("PUT", "POST")


def uploads(attempts: Attempts, proxy: Proxy, folder: str) -> int:
    """How many requests an undisturbed attempt uploads with."""
    start_run(folder, PROMPTS, SHAPE)
    count = Counter[bool]()
    proxy.rule = lambda head: count.update([is_upload(head)])
    assert attempts.run(folder) == 0
    proxy.rule = lambda _: None
    return count[True]


def kill_at(attempts: Attempts, proxy: Proxy, folder: str, when: int) -> int:
    """The code of an attempt that is killed in the middle of its `when`-th upload."""
    left = [when]

    def rule(head: Head) -> Fault | None:
        left[0] -= is_upload(head)
        return "stop" if is_upload(head) and left[0] == 0 else None

    pid = attempts.hold(folder)
    proxy.on_stop = lambda: os.kill(pid, signal.SIGKILL)
    proxy.rule = rule
    os.kill(pid, signal.SIGCONT)
    code = attempts.code()
    proxy.rule = lambda _: None
    return code


def kill_uploads(attempts: Attempts, proxy: Proxy, seaweed: Seaweed, kills: int,
                 seed: int) -> tuple[Counter[str], float]:
    """What each kill left, and the longest time to a whole dataset after it."""
    chance = random.Random(seed)
    total, left, longest = uploads(attempts, proxy, seaweed.new_folder()), Counter[str](), 0.0
    for _ in range(kills):
        folder = seaweed.new_folder()
        start_run(folder, PROMPTS, SHAPE)
        assert kill_at(attempts, proxy, folder, chance.randint(1, total)) == -signal.SIGKILL
        started = time.monotonic()
        report = verify(open_root(folder))
        assert report.problems == (), report
        assert report.traces in (0, PROMPTS), report
        left["committed" if report.traces else "absent"] += 1
        assert attempts.run(folder) == 0
        report = verify(open_root(folder))
        assert report.clean, report
        assert report.traces == PROMPTS, report
        longest = max(longest, time.monotonic() - started)
    return left, longest


@pytest.mark.parametrize("how", PARTS)
def test_three_kills_in_an_upload_leave_nothing_or_everything(how, tmp_path, proxy, seaweed, fault_row) -> None:
    make_dataset(tmp_path / "donor", PROMPTS, SHAPE)
    with Attempts(tmp_path / "donor", PARTS[how]) as attempts:
        _, seconds = kill_uploads(attempts, proxy, seaweed, 3, time.time_ns())
    fault_row(f"{how}: upload killed (fast)", 3, 3, seconds=seconds)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", PARTS)
def test_thirty_kills_in_an_upload_leave_nothing_or_everything(how, tmp_path, proxy, seaweed, fault_row) -> None:
    make_dataset(tmp_path / "donor", PROMPTS, SHAPE)
    with Attempts(tmp_path / "donor", PARTS[how]) as attempts:
        left, seconds = kill_uploads(attempts, proxy, seaweed, 30, 1)
    assert left.keys() == {"absent", "committed"}, left
    fault_row(f"{how}: upload killed", 30, 30, seconds=seconds)
