"""`bench-capture` on the real engine. Catches rounds that do different work, and times that are not of capture."""

import json
from pathlib import Path

import pytest
from byte_target import make_byte_target
from runs import command

pytestmark = pytest.mark.engine


def test_the_gauge_runs_the_same_requests_with_capture_and_without(tmp_path: Path) -> None:
    target = make_byte_target(tmp_path / "target")
    done = command("bench-capture", "--target", target, "--prompts", 6, "--rounds", 2, "--layers", "0,2", "--set",
                   "sampling.max_tokens=12", "--set", "prompts_per_shard=3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], len(found["rounds"])) == (6, 2)
    assert 6 <= found["rows"] <= 6 * 12
    assert found["tokens"] > found["rows"]
    assert all(r["plain"] > 0 and r["capture"] > 0 for r in found["rounds"])
    assert found["captured_seconds"] == pytest.approx(sum(r["capture"] for r in found["rounds"]))
    step_seconds, (assemble, encode, commit, waited) = found["times"]
    # What capture did in the engine's thread is part of the captured time, and some of it was done in each place.
    assert 0 < step_seconds < found["captured_seconds"]
    assert min(assemble, encode, commit) > 0
    assert waited == 0


def test_the_gauge_shows_where_the_time_went_and_refuses_a_wrong_job(tmp_path: Path) -> None:
    target = make_byte_target(tmp_path / "target")
    shown = command("bench-capture", "--target", target, "--prompts", 2, "--rounds", 1, "--layers", "none", "--set",
                    "sampling.max_tokens=4")
    assert shown.returncode == 0, shown.stderr
    assert "captured over plain" in shown.stdout
    assert "the sink's thread, encoding" in shown.stdout
    wrong = command("bench-capture", "--target", target, "--layers", "9")
    assert wrong.returncode == 2
    assert "layer 9 is out of range" in wrong.stderr
