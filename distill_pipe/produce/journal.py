"""What happens in a run, for machines: a file with one JSON object per line (`--log-json`), and counters.

A line has `time` (UTC), `event`, and the fields of that event; it is written at once and whole, so a run that is killed
leaves a file that ends in a whole line or a torn last one. The counters' names are fixed, since dashboards use them.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import msgspec

from distill_pipe.errors import UsageError
from distill_pipe.redact import redacted

EventName = Literal["run_started", "engine_started", "engine_lost", "shard_committed", "shard_failed",
                    "prompt_quarantined", "run_ended"]
CounterName = Literal["prompts", "tokens", "shards", "quarantined", "retries", "failures", "commit_seconds"]
GaugeName = Literal["engines", "shards_left"]

COUNTERS: Mapping[CounterName, str] = {
    "prompts": "prompts that the engine finished", "tokens": "tokens that ran through the target",
    "shards": "shards committed", "quarantined": "prompts given up on", "retries": "shards given back by lost engines",
    "failures": "failures, by whose fault they were", "commit_seconds": "time spent on commits"}
GAUGES: Mapping[GaugeName, str] = {"engines": "engines that can take work", "shards_left": "shards not yet committed"}


class Meter(Protocol):
    """What Ray's counters and gauges have in common here."""

    def inc(self, value: float, tags: dict[str, str]) -> None: ...

    def set(self, value: float) -> None: ...


class Meters:
    """The counters and gauges of a run. `make` gets each one's name, description and labels."""

    def __init__(self, counter: Callable[[str, str, tuple[str, ...]], Meter],
                 gauge: Callable[[str, str, tuple[str, ...]], Meter]) -> None:
        self._counters = {name: counter(f"distill_pipe_{name}_total", text, ("class",) if name == "failures" else ())
                          for name, text in COUNTERS.items()}
        self._gauges = {name: gauge(f"distill_pipe_{name}", text, ()) for name, text in GAUGES.items()}

    def add(self, name: CounterName, value: float, **labels: str) -> None:
        """Count; labels are those of `failures`."""
        if value > 0:
            self._counters[name].inc(value, labels)

    def show(self, name: GaugeName, value: float) -> None:
        """Set a gauge."""
        self._gauges[name].set(value)


class Journal:
    """The event log. Without a file, events are dropped."""

    def __init__(self, path: Path | None = None) -> None:
        try:
            self._file = None if path is None else open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"--log-json {path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: EventName, **fields: str | int | float | None) -> None:
        """Append an event. Texts lose what looks like a secret."""
        if self._file is None:
            return
        now = datetime.now(UTC).isoformat("T", "milliseconds")
        plain = {name: redacted(value) if isinstance(value, str) else value for name, value in fields.items()}
        self._file.write(msgspec.json.encode({"time": now, "event": event, **plain}) + b"\n")
