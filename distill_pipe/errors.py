"""Every failure that distill-pipe reports on purpose, and the exit code it ends with.

    DistillPipeError            1
    ├── UsageError              2    the command, the job file or the corpus is wrong; nothing was written
    ├── QuarantineLimitError    3    more prompts were given up on than the run allows
    ├── MismatchError           4    the dataset belongs to another run, or is of another format
    ├── StorageFullError        5    no room (or quota) left for a shard; safe to run again
    ├── StoreAccessError        6    the store refuses our credentials, or has none of ours
    ├── StoreError              75   the store failed, or could not be reached for a long time; safe to run again
    ├── EngineError             7    no engine is left
    │   ├── EngineStartError    7    the engine cannot be started with this target; trying again would not help
    │   └── ClusterError        7    there is no machine, or no place on one, for an engine
    ├── CaptureError            7    the engine's rows are incomplete or inconsistent; the shard was not written
    │   └── NotFiniteError      7    a value is NaN or infinite; during a run the prompt is quarantined instead
    ├── DamageError             8    `verify`, or a reader, found missing or damaged data
    └── AuditError              8    `audit` found rows or states that are not what the target says

A user's mistake ends in one line on stderr and its code, never in a traceback. The trade-off: the code belongs to the
class, so that a script can act on it, and one class never ends in two codes. All are picklable (Ray ships them between
processes) because they carry one message and nothing else.

Each also says whose fault it was, which decides what a run does about it: a machine's or network's (`infra`: the work
is done again elsewhere), the engine's (`engine`: its prompts are suspected), the job's or its prompts' (`data`), the
place's where the dataset lies (`store`), or ours (`bug`).
"""

FAILURE_CLASSES = ("infra", "engine", "data", "store", "bug")


class DistillPipeError(Exception):
    """Base of all failures reported on purpose."""

    exit_code = 1
    failure = "bug"


class UsageError(DistillPipeError, ValueError):
    """The user asked for something that cannot be done; the message says what to change."""

    exit_code = 2
    failure = "data"


class QuarantineLimitError(DistillPipeError):
    """More prompts were quarantined than the run allows."""

    exit_code = 3
    failure = "data"


class MismatchError(DistillPipeError, ValueError):
    """The stored dataset and this run, or this version, do not belong together."""

    exit_code = 4
    failure = "data"


class StorageFullError(DistillPipeError, OSError):
    """The store has no room left."""

    exit_code = 5
    failure = "store"


class StoreAccessError(DistillPipeError):
    """The store refuses our credentials."""

    exit_code = 6
    failure = "store"


class StoreError(DistillPipeError, OSError):
    """The store failed. What is committed is safe, and the same command continues."""

    exit_code = 75
    failure = "store"


class EngineError(DistillPipeError, RuntimeError):
    """No engine can do the work."""

    exit_code = 7
    failure = "engine"


class EngineStartError(EngineError):
    """The engine refuses the target, its settings, or this machine."""


class ClusterError(EngineError):
    """Ray cannot be reached, or has no place for an engine."""

    failure = "infra"


class CaptureError(DistillPipeError, RuntimeError):
    """What the engine delivered is not a complete, finite supervision of the prompt."""

    exit_code = 7
    failure = "engine"


class NotFiniteError(CaptureError):
    """A captured value is NaN or infinite."""


class DamageError(DistillPipeError):
    """Stored data is missing or damaged."""

    exit_code = 8
    failure = "store"


class AuditError(DistillPipeError):
    """Stored supervision is further from the replayed target than the audit's limits allow."""

    exit_code = 8
    failure = "data"


def failure_class(error: BaseException) -> str:
    """Whose fault any exception is: of those that are not ours, failing I/O is the store's and the rest are bugs."""
    if isinstance(error, DistillPipeError):
        return error.failure
    return "store" if isinstance(error, OSError) else "bug"
