"""Catches names of counters that dashboards do not know, and event lines that a machine cannot read."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.journal import Journal, Meters
from distill_pipe.redact import MASK

COUNTERS = {f"distill_pipe_{name}_total" for name in (
    "prompts", "tokens", "shards", "quarantined", "retries", "failures", "commit_seconds")}
GAUGES = {"distill_pipe_engines", "distill_pipe_shards_left"}


class Recorded:
    """A counter or gauge that remembers."""

    made: dict[str, "Recorded"]

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        assert description
        self.labels, self.values = labels, list[tuple[float, dict[str, str]]]()
        self.made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))

    def set(self, value: float) -> None:
        self.values.append((value, {}))


def test_counters_have_their_fixed_names_and_only_failures_a_label() -> None:
    Recorded.made = {}
    meters = Meters(Recorded, Recorded)
    assert set(Recorded.made) == COUNTERS | GAUGES
    assert {name for name, meter in Recorded.made.items() if meter.labels} == {"distill_pipe_failures_total"}
    meters.add("tokens", 17)
    meters.add("prompts", 0)
    meters.add("failures", 1, **{"class": "infra"})
    meters.show("engines", 3)
    assert Recorded.made["distill_pipe_tokens_total"].values == [(17, {})]
    assert Recorded.made["distill_pipe_prompts_total"].values == [], "Ray's counters refuse to add nothing"
    assert Recorded.made["distill_pipe_failures_total"].values == [(1, {"class": "infra"})]
    assert Recorded.made["distill_pipe_engines"].values == [(3, {})]


def test_events_are_appended_one_object_a_line_with_their_time_and_without_secrets(tmp_path: Path) -> None:
    for shard in range(2):
        with Journal(tmp_path / "log") as journal:
            journal.write("shard_failed", shard=shard, **{"class": "store", "reason": "hf_abcdefghijkl\nwas refused"})
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert first == {"event": "shard_failed", "shard": 0, "class": "store", "reason": f"{MASK}\nwas refused"}
    assert second["shard"] == 1


def test_a_log_that_cannot_be_written_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--log-json .* cannot be written"):
        Journal(tmp_path / "nowhere" / "log")


def test_without_a_file_events_are_dropped() -> None:
    with Journal() as journal:
        journal.write("run_ended", how="finished")
