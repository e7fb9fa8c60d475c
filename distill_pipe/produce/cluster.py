"""Engines on Ray: the one file that imports ray. Placement, retry, and who works on which shard.

Plain actors and a small pull scheduler of our own. Ray runs things at least once and may run them twice; that is
harmless, because a commit is create-if-absent. All state is in the store: a driver that dies is started again and
finds what is left by listing. Nothing large passes through Ray.

Engines start as Ray finds room for them: those with a place work while others wait for a node, and a run gives up when
no engine gets a place for PLACEMENT_SECONDS. The price is that a run with too little room for all is slow, not refused.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import msgspec

from distill_pipe.errors import (
    CaptureError,
    DamageError,
    DistillPipeError,
    EngineError,
    EngineStartError,
    MismatchError,
    StorageFullError,
)
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.engines import start_engine, start_renderer
from distill_pipe.produce.worker import Progress, ShardWorker
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root, open_root

SHARDS_IN_FLIGHT = 2
POLL_SECONDS = 1.0
# Machines that an autoscaler orders take minutes.
PLACEMENT_SECONDS = 600.0
DEATHS_WITHOUT_PROGRESS = 3
_OBJECT_STORE_BYTES = 100 << 20
_SHARD_ERRORS = {e.__name__: e for e in (CaptureError, DamageError, MismatchError, StorageFullError)}


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """Where the work runs. `address` None starts Ray on this machine."""

    model: str
    revision: str | None
    workers: int
    address: str | None
    engine: EngineOptions


class _Replica:
    """The actor: one engine and the shards given to it."""

    def __init__(self, plan: ClusterPlan, run: bytes, root: str, cpu_threads: int) -> None:
        self._plan, self._run, self._root, self._cpu_threads = plan, run, root, cpu_threads
        self._worker: ShardWorker | None = None

    def placed(self) -> None:
        """Answers as soon as Ray has found a place for the actor."""

    def advance(self, shards: list[int], seconds: float) -> Progress:
        # Not started in __init__: an error there would reach the driver as a dead actor, without its class.
        if self._worker is None:
            self._worker = self._start()
        return self._worker.advance(shards, seconds)

    def _start(self) -> ShardWorker:
        if self._plan.engine.distributed_executor_backend == "ray":
            import ray

            # Without it, vLLM's processes would start a cluster of their own.
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        # Ray sets this to the CPUs an actor reserves; OpenMP reads it when torch is imported below.
        os.environ["OMP_NUM_THREADS"] = str(self._cpu_threads)
        run, root, model = msgspec.json.decode(self._run, type=Run), open_root(self._root), self._plan.model
        renderer = start_renderer(run, model, self._plan.revision)
        engine = start_engine(run, root, model, self._plan.revision, self._plan.engine)
        return ShardWorker(engine, renderer, root, run)


@dataclass(slots=True)
class _Slot:
    """A place for an engine: its actor, the devices kept for it, what it is working on, and how often it died without
    finishing a shard."""

    actor: Any = None
    group: Any = None
    placed: bool = False
    call: Any = None
    shards: set[int] = field(default_factory=set)
    deaths: int = 0


def run_on_ray(plan: ClusterPlan, run: Run, root: Root, todo: deque[int],
               on_progress: Callable[[Progress], None]) -> None:
    """Run every shard in `todo` and report as they finish.

    Raises:
        EngineError: no engine can be started, or engines keep dying.
        CaptureError, MismatchError, StorageFullError: a shard could not be captured or committed.
    """
    import ray

    slots = [_Slot() for _ in range(plan.workers)]
    # Ray tells of dead workers on stdout, which belongs to the command's own output.
    with redirect_stdout(sys.stderr):
        _start_ray(ray, plan)
        try:
            _require_local_devices(ray, plan)
            while todo or any(slot.shards for slot in slots):
                for slot in slots:
                    _feed(ray, slot, plan, run, root, todo)
                calls = {slot.call: slot for slot in slots if slot.call is not None}
                patience = None if any(slot.placed for slot in slots) else PLACEMENT_SECONDS
                ready, _ = ray.wait(list(calls), num_returns=1, timeout=patience)
                if not ready:
                    raise EngineError(_shortage(ray, plan))
                _collect(ray, calls[ready[0]], todo, on_progress)
        finally:
            ray.shutdown()


def _start_ray(ray: Any, plan: ClusterPlan) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's coming default for actors without an accelerator; left unset, it prints a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = {} if plan.address else {"num_cpus": max(plan.workers, os.cpu_count() or 1), "include_dashboard": False,
                                     "object_store_memory": _OBJECT_STORE_BYTES}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=plan.address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"Ray cannot be reached at {plan.address or 'this machine'}: {error}") from error
    # Ray puts a handler of its own in place, which ends the process before the run can be closed.
    signal.signal(signal.SIGTERM, handler)


def _feed(ray: Any, slot: _Slot, plan: ClusterPlan, run: Run, root: Root, todo: deque[int]) -> None:
    """Give a slot shards up to its share, and let it run on when it is not already running. An engine that waits for a
    place holds no shards."""
    if slot.call is not None or not (todo or slot.shards):
        return
    if slot.actor is None:
        slot.actor = _start_replica(ray, slot, plan, run, root)
        slot.call = slot.actor.placed.remote()
        return
    fresh = []
    while todo and len(slot.shards) < SHARDS_IN_FLIGHT:
        fresh.append(todo.popleft())
        slot.shards.add(fresh[-1])
    if slot.shards:
        slot.call = slot.actor.advance.remote(fresh, POLL_SECONDS)


def _start_replica(ray: Any, slot: _Slot, plan: ClusterPlan, run: Run, root: Root) -> Any:
    kind, count = _engine_takes(ray, plan)
    threads = int(os.environ.get("OMP_NUM_THREADS")
                  or max((os.cpu_count() or 1) // (plan.workers * plan.engine.devices), 1))
    place: dict[str, Any] = {"num_cpus": 1, "num_gpus": count if kind == "GPU" else 0}
    if plan.engine.distributed_executor_backend == "ray":
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        slot.group = _reserve(ray, count)
        # vLLM looks for the group that its process is in. Its workers take the devices, so the actor asks for none.
        place = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(
            slot.group, placement_group_capture_child_tasks=True)}
    actor = ray.remote(max_restarts=0, max_task_retries=0, **place)(_Replica)
    return actor.remote(plan, msgspec.json.encode(run), str(root), threads)


def _reserve(ray: Any, devices: int) -> Any:
    """A group of one GPU each, which is all that vLLM accepts: on one node when any has so many, where its GPUs are
    fastest together; else on as few nodes as possible."""
    largest = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    return ray.util.placement_group([{"GPU": 1}] * devices, strategy="STRICT_PACK" if largest >= devices else "PACK")


def _engine_takes(ray: Any, plan: ClusterPlan) -> tuple[str, int]:
    """Which of Ray's resources one engine takes, and how many."""
    if plan.engine.distributed_executor_backend == "ray" or ray.cluster_resources().get("GPU"):
        return "GPU", plan.engine.devices
    return "CPU", 1


def _require_local_devices(ray: Any, plan: ClusterPlan) -> None:
    """Refuse at once what Ray on this machine alone can never place."""
    kind, count = _engine_takes(ray, plan)
    needed, total = count * plan.workers, int(ray.cluster_resources().get(kind, 0))
    if plan.address is None and total < needed:
        raise EngineError(f"{plan.workers} x {count} {kind}s are needed and this machine has {total}: {needed - total} "
                          "are missing; lower `workers` or the engine's parallel sizes, or give a cluster's `address`")


def _shortage(ray: Any, plan: ClusterPlan) -> str:
    """Why no engine has a place."""
    kind, count = _engine_takes(ray, plan)
    total, free = (int(found.get(kind, 0)) for found in (ray.cluster_resources(), ray.available_resources()))
    start = (f"no engine found a place within {PLACEMENT_SECONDS:g} s: it takes {count} {kind}s, and {free} of the "
             f"cluster's {total} are free")
    if free < count:
        return f"{start}; {count - free} are missing"
    spread = "" if plan.engine.distributed_executor_backend == "ray" else (
        "; engine.distributed_executor_backend=ray spreads an engine over nodes")
    return f"{start}, but not on one node{spread}"


def _collect(ray: Any, slot: _Slot, todo: deque[int], on_progress: Callable[[Progress], None]) -> None:
    """Take a finished call's result; a dead engine gives its shards back."""
    call, slot.call = slot.call, None
    try:
        progress: Progress | None = ray.get(call)
    except ray.exceptions.RayTaskError as error:
        cause = error.as_instanceof_cause()
        if not _is_engines_death(error.cause):
            raise _plain(cause) from error
        _lose(ray, slot, todo, cause)
        return
    except ray.exceptions.RayActorError as error:
        _lose(ray, slot, todo, error)
        return
    if progress is None:
        slot.placed = True
        return
    for outcome in progress.outcomes:
        slot.shards.discard(outcome.shard)
        slot.deaths = 0
        if outcome.fragment is None:
            kind = _SHARD_ERRORS.get(outcome.error, DistillPipeError)
            raise kind(f"shard {outcome.shard}: {outcome.message}")
    on_progress(progress)


def _is_engines_death(cause: BaseException) -> bool:
    """Whether another engine may do what this one could not. A call that vLLM does not live to answer ends in a plain
    Exception, a class that tells nothing else."""
    return type(cause) is Exception or (isinstance(cause, EngineError) and not isinstance(cause, EngineStartError))


def _lose(ray: Any, slot: _Slot, todo: deque[int], cause: Exception) -> None:
    todo.extendleft(sorted(slot.shards, reverse=True))
    slot.shards.clear()
    slot.deaths += 1
    _release(ray, slot)
    if slot.deaths >= DEATHS_WITHOUT_PROGRESS:
        # Ray's text of a failed start holds a whole traceback; its last line is the cause.
        reason = ([line.strip() for line in str(cause).splitlines() if line.strip()] or ["unknown"])[-1][:500]
        raise EngineError(f"the engine died {slot.deaths} times without finishing a shard; the last cause: {reason}")


def _release(ray: Any, slot: _Slot) -> None:
    """End an engine for good and give its devices back; what it reserved at the end of a run goes with Ray's job."""
    ray.kill(slot.actor)
    if slot.group is not None:
        ray.util.remove_placement_group(slot.group)
    slot.actor = slot.group = None
    slot.placed = False


def _plain(cause: BaseException) -> BaseException:
    """Ray's wrapper carries a remote traceback in its text; the user gets the message of our own error alone."""
    for kind in type(cause).__mro__:
        if kind.__module__ == DistillPipeError.__module__:
            plain: BaseException = kind(str(getattr(cause, "cause", cause)))
            return plain
    return cause
