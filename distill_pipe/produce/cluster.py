"""Engines on Ray: the one file that imports ray. Where each engine runs, and what became of it.

Plain actors; who works on which shard is the schedule's matter. Ray runs things at least once and may run them twice;
that is harmless, because a commit is create-if-absent. All state is in the store: a driver that dies is started again
and finds what is left by listing. Nothing large passes through Ray.

Engines start as Ray finds room for them: those with a place work while others wait for a node, and a run gives up when
no engine gets a place for PLACEMENT_SECONDS. The price is that a run with too little room for all is slow, not refused.
"""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from distill_pipe.errors import ClusterError, DistillPipeError, EngineError, EngineStartError
from distill_pipe.produce.driver import (
    POLL_SECONDS,
    POLLS_PER_SECOND,
    Driver,
    Ready,
    Report,
)
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.journal import Journal, Meters
from distill_pipe.produce.ray_address import require_answer
from distill_pipe.produce.replica import EnginePlan, Place, Replica
from distill_pipe.produce.schedule import Failure, Limits, Schedule, Work, shards_in_flight
from distill_pipe.produce.worker import Progress
from distill_pipe.redact import redacted
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root

_OBJECT_STORE_BYTES: Final = 100 << 20
_REASON_CHARACTERS: Final = 500


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """Where the work runs. `address` None starts Ray on this machine."""

    model: str
    revision: str | None
    workers: int
    address: str | None
    engine: EngineOptions
    limits: Limits


class _Replica(Replica):
    """The actor."""

    def placed(self) -> Place:
        import ray

        context = ray.get_runtime_context()
        if self._plan.options.distributed_executor_backend == "ray":
            # Without it, vLLM's processes would start a cluster of their own.
            os.environ["RAY_ADDRESS"] = context.gcs_address
        return self.place(context.get_node_id())


@dataclass(slots=True)
class _Slot:
    """An engine's actor, the devices kept for it, and the call that it is in."""

    actor: Any
    group: Any = None
    place: Place | None = None
    ready: bool = False
    call: Any = None


class RayPool:
    """See `Pool` for the contract."""

    def __init__(self, ray: Any, plan: ClusterPlan, run: Run, root: Root) -> None:
        self._ray, self._plan, self._run, self._root = ray, plan, msgspec.json.encode(run), str(root)
        self._here = ray.get_runtime_context().get_node_id()
        self._slots: dict[int, _Slot] = {}

    def start(self, engine: int) -> None:
        slot = self._slots[engine] = _start_replica(self._ray, self._plan, self._run, self._root)
        slot.call = slot.actor.placed.remote()

    def advance(self, engine: int, work: list[Work], seconds: float) -> None:
        slot = self._slots[engine]
        slot.call = slot.actor.advance.remote(work, seconds)

    def drain(self, engine: int, seconds: float) -> None:
        slot = self._slots[engine]
        slot.call = slot.actor.drain.remote(seconds)

    def kill(self, engine: int) -> None:
        """Ray asks a process to end; one that is stopped does not hear it."""
        slot = self._slots.pop(engine)
        self._ray.kill(slot.actor)
        if slot.group is not None:
            self._ray.util.remove_placement_group(slot.group)
        if slot.place is not None and slot.place.node == self._here:
            with suppress(ProcessLookupError):
                os.kill(slot.place.pid, signal.SIGKILL)

    def idle(self) -> list[int]:
        return [engine for engine, slot in self._slots.items() if slot.ready and slot.call is None]

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        calls = {slot.call: engine for engine, slot in self._slots.items() if slot.call is not None}
        if not calls:
            return []
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready and len(calls) > 1:
            # Whatever else is ready too, so that many engines do not cost many looks at all of them.
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return [(calls[call], self._collect(calls[call], call)) for call in ready]

    def leaving(self) -> Iterable[int]:
        """Ray has no public call for it, so without the private one nobody is known to leave."""
        look = getattr(self._ray._private.state.state, "get_draining_nodes", dict)
        draining = set(look())
        return [i for i, slot in self._slots.items() if slot.place is not None and slot.place.node in draining]

    def shortage(self, seconds: float) -> str:
        kind, count = _engine_takes(self._ray, self._plan)
        total, free = (int(found.get(kind, 0)) for found in (self._ray.cluster_resources(),
                                                              self._ray.available_resources()))
        start = (f"no engine found a place within {seconds:g} s: it takes {count} {kind}s, and {free} of the "
                 f"cluster's {total} are free")
        if free < count:
            return f"{start}; {count - free} are missing"
        spread = "" if self._plan.engine.distributed_executor_backend == "ray" else (
            "; engine.distributed_executor_backend=ray spreads an engine over nodes")
        return f"{start}, but not on one node{spread}"

    def _collect(self, engine: int, call: Any) -> Report:
        """A finished call's result. A dead engine gives up its place."""
        slot, errors = self._slots[engine], self._ray.exceptions
        slot.call = None
        try:
            result = self._ray.get(call)
        except errors.RayTaskError as error:
            if not _is_engines_death(error.cause):
                raise _plain(error.as_instanceof_cause()) from error
            failure = Failure("engine", _last_line(error.as_instanceof_cause()))
        except errors.RayError as error:
            failure = Failure(self._fault(slot, error), _last_line(error))
        else:
            return self._answer(slot, result)
        self.kill(engine)
        return failure

    def _answer(self, slot: _Slot, result: Place | Progress | None) -> Report:
        if isinstance(result, Place):
            slot.place, slot.call = result, slot.actor.start.remote()
            return result
        if result is None:
            slot.ready = True
            return Ready()
        return result

    def _fault(self, slot: _Slot, error: Any) -> str:
        """An engine that went down with its machine is no fault of what it worked on."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        lost = slot.place is not None and slot.place.node not in alive
        return "infra" if lost or getattr(error, "preempted", False) else "engine"


def run_on_ray(plan: ClusterPlan, run: Run, root: Root, todo: Iterable[int], shards_left: int,
               on_progress: Callable[[Progress], None], journal: Journal, stopping: Callable[[], bool]) -> None:
    """Run every shard in `todo` and report as they finish. Raises as `Driver.run`."""
    if plan.address is None:
        _guard_ray()
    import ray

    spec = run.spec
    schedule = Schedule(todo, plan.workers, spec.prompts_per_shard, spec.corpus.prompts,
                        shards_in_flight(plan.engine.max_num_seqs, spec.prompts_per_shard), plan.limits)
    # Ray tells of dead workers on stdout, which belongs to the command's own output.
    with redirect_stdout(sys.stderr):
        _start_ray(ray, plan)
        try:
            _require_local_devices(ray, plan)
            poll = max(POLL_SECONDS, plan.workers / POLLS_PER_SECOND)
            Driver(RayPool(ray, plan, run, root), schedule, on_progress, journal, _meters(), poll).run(
                shards_left, stopping)
        finally:
            ray.shutdown()


def _start_ray(ray: Any, plan: ClusterPlan) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's coming default for actors without an accelerator; left unset, it prints a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local: dict[str, Any] = {}
    if plan.address is not None:
        require_answer(plan.address)
    else:
        local = {"num_cpus": max(plan.workers, os.cpu_count() or 1), "include_dashboard": False,
                 "object_store_memory": _OBJECT_STORE_BYTES}
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        ray.init(address=plan.address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except Exception as error:  # Ray raises no narrower class where a node is not up in time
        place = plan.address or "this machine"
        raise ClusterError(f"Ray cannot be reached at {place}: {redacted(str(error))}") from error
    # Ray puts a handler of its own in place, which ends the process before the run can be closed.
    for name, handler in handlers.items():
        if in_main_thread and handler is not None:
            signal.signal(name, handler)


def _guard_ray() -> None:
    """Who reaches a Ray may run code on it: one that we start takes orders from this run alone. Ray reads these when it
    is imported."""
    # Its name speaks of other systems, but this is what makes Ray listen on the loopback interface alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _meters() -> Meters:
    from ray.util import metrics

    return Meters(lambda *described: metrics.Counter(*described), lambda *described: metrics.Gauge(*described))


def _start_replica(ray: Any, plan: ClusterPlan, run: bytes, root: str) -> _Slot:
    kind, count = _engine_takes(ray, plan)
    threads = int(os.environ.get("OMP_NUM_THREADS")
                  or max((os.cpu_count() or 1) // (plan.workers * plan.engine.devices), 1))
    place: dict[str, Any] = {"num_cpus": 1, "num_gpus": count if kind == "GPU" else 0}
    group = None
    if plan.engine.distributed_executor_backend == "ray":
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = _reserve(ray, count)
        # vLLM looks for the group that its process is in. Its workers take the devices, so the actor asks for none.
        place = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_capture_child_tasks=True)}
    actor = ray.remote(max_restarts=0, max_task_retries=0, **place)(_Replica)
    return _Slot(actor.remote(EnginePlan(plan.model, plan.revision, plan.engine, run, root, threads)), group)


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
        raise ClusterError(f"{plan.workers} x {count} {kind}s are needed and this machine has {total}: "
                           f"{needed - total} are missing; lower `workers` or the engine's parallel sizes, or give a "
                           "cluster's `address`")


def _is_engines_death(cause: BaseException) -> bool:
    """Whether another engine may do what this one could not. A call that vLLM does not live to answer ends in a plain
    Exception, a class that tells nothing else."""
    return type(cause) is Exception or (isinstance(cause, EngineError) and not isinstance(cause, EngineStartError))


def _last_line(error: BaseException) -> str:
    """Ray's text of a failure holds a whole traceback; its last line is the cause, and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted((lines or ["unknown"])[-1].partition(" Some common causes")[0][:_REASON_CHARACTERS])


def _plain(cause: BaseException) -> BaseException:
    """Ray's wrapper carries a remote traceback in its text; the user gets the message of our own error alone."""
    for kind in type(cause).__mro__:
        if kind.__module__ == DistillPipeError.__module__:
            plain: BaseException = kind(str(getattr(cause, "cause", cause)))
            return plain
    return cause
