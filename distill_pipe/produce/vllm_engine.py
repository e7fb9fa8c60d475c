"""vLLM as a target engine: the one file that imports vLLM on the driver's side of the engine.

Capture happens in vLLM's worker process (`capture.py`); here are only requests, their results and small control calls.
No request reads the prefix cache, since a hit computes no rows; CUDA graphs and compilation stay on except on CPU,
where they cost more start-up than they win.

Shapes: T tokens.
"""

import os
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from distill_pipe.errors import CaptureError, EngineError, EngineStartError
from distill_pipe.produce.capture import EXTRA_ARG, CaptureTimes
from distill_pipe.produce.core_watch import watch_core
from distill_pipe.produce.engine import (
    EngineOptions,
    FinishedTrace,
    Request,
    RequestError,
    Response,
    ShardOutcome,
)
from distill_pipe.produce.sizes import CPU_BATCH_TOKENS, CPU_KV_CACHE_BYTES
from distill_pipe.produce.step import NO_TOKEN, Wanted
from distill_pipe.produce.tiktoken_file import tokenizer_folder
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.spec import RunSpec

_REASON_CHARACTERS = 500


class VllmEngine:
    """A vLLM engine that captures one run. See `TargetEngine` for the contract."""

    def __init__(self, model: str, revision: str | None, run: Run, root: Root,
                 options: EngineOptions) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # A worker that waits for a slow disk is no dead worker, which vLLM would take it for after five minutes.
        os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "86400")
        from vllm import LLM
        from vllm.platforms import current_platform
        from vllm.v1.engine.exceptions import EngineDeadError

        self._dead = EngineDeadError
        on_cpu = current_platform.is_cpu()
        if on_cpu:
            # An engine core in a process of its own spins on a core that the model could use and starts 20 s later.
            # In one process, binding threads to cores makes each of vLLM's kernels wait at its end: seven times slower.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            self._engine = LLM(**engine_arguments(model, revision, run.spec, options, on_cpu)).llm_engine
        except Exception as error:  # vLLM itself reports a worker that failed as a plain Exception
            raise EngineStartError(f"vLLM cannot run {model}: {_reason(error)}") from error
        watch_core(self._engine)
        self.open(run, root)

    def open(self, run: Run, root: Root) -> None:
        """Capture `run` from now on; it may differ from the last one in everything but target, layers and context.

        Raises:
            EngineStartError: this vLLM, or this layout of it, cannot be captured.
        """
        self._run, self._sampling = run, run.spec.sampling
        refusal = self._rpc("capture_open", msgspec.json.encode(run), str(root))
        if refusal:
            raise EngineStartError(str(refusal))

    def add(self, request: Request) -> None:
        given = bool(request.loss_mask_T)
        token_ids = list(request.token_ids_T)
        if given:
            # The last token supervises nothing, so it is not computed; its log-probability still is.
            rows = _ranges(np.asarray(request.loss_mask_T, bool)[1:])
            wanted = Wanted(request.ordinal, rows, token_ids.pop())
        else:
            first = len(token_ids) - 1
            wanted = Wanted(request.ordinal, ((first, self._run.spec.engine.max_model_len),), NO_TOKEN)
        try:
            self._engine.add_request(str(request.ordinal), {"prompt_token_ids": token_ids},
                                     self._sampling_params(wanted, given, len(token_ids)))
        except ValueError as error:
            raise RequestError(str(error)) from error

    def step(self) -> list[Response]:
        if not self.busy:
            return []
        try:
            outputs = self._engine.step()
        except CaptureError:
            raise
        except Exception as error:
            # A dead process shows as an exception of any kind here, and so does a kernel that a batch does not suit.
            raise EngineError(f"the vLLM engine died: {type(error).__name__}: {_reason(error)}") from error
        return [_response(output) for output in outputs if output.finished]

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        self._rpc("capture_finish", shard, msgspec.msgpack.encode(traces))

    def commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        self._rpc("capture_commit", shard, msgspec.msgpack.encode(quarantined))

    def outcomes(self) -> list[ShardOutcome]:
        return msgspec.msgpack.decode(self._rpc("capture_outcomes"), type=list[ShardOutcome])

    @property
    def writes_responses(self) -> bool:
        """Whether the run's responses are the target's own."""
        return self._sampling is not None

    @property
    def busy(self) -> bool:
        """Whether requests are left to run."""
        return bool(self._engine.has_unfinished_requests())

    def times(self) -> CaptureTimes:
        """Where the time of capture went since `open`."""
        return msgspec.msgpack.decode(self._rpc("capture_times"), type=CaptureTimes)

    def add_plain(self, ordinal: int, token_ids: Sequence[int], max_tokens: int, logprobs: int | None = None,
                  prompt_logprobs: int | None = None) -> None:
        """Take a request that is run as a captured one would be, and not captured. For comparison vLLM can report its
        own log-probabilities."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        drawn = {"temperature": 0.0} if self._sampling is None else {
            "temperature": self._sampling.temperature, "top_p": self._sampling.top_p,
            "seed": _prompt_seed(self._sampling.seed, ordinal)}
        self._engine.add_request(str(ordinal), {"prompt_token_ids": list(token_ids)}, SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, detokenize=False, skip_reading_prefix_cache=True,
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY, **drawn))

    def _rpc(self, method: str, *args: object) -> Any:
        try:
            results = self._engine.collective_rpc(method, args=args)
        except self._dead as error:
            raise EngineError(f"the vLLM engine died: {error}") from error
        # One of an engine's devices ships what is captured; the others have no answer.
        return next((result for result in results if result is not None), b"")

    def _sampling_params(self, wanted: Wanted, given: bool, prompt_tokens: int) -> object:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {EXTRA_ARG: msgspec.to_builtins(wanted)}
        if given or self._sampling is None:
            return SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra,
                                  skip_reading_prefix_cache=True, output_kind=RequestOutputKind.FINAL_ONLY)
        room = self._run.spec.engine.max_model_len - prompt_tokens
        return SamplingParams(
            temperature=self._sampling.temperature, top_p=self._sampling.top_p,
            max_tokens=min(self._sampling.max_tokens, room), seed=_prompt_seed(self._sampling.seed, wanted.ordinal),
            detokenize=False, extra_args=extra, skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY)


def _response(output: object) -> Response:
    done = output.outputs[0]  # type: ignore[attr-defined]
    return Response(int(output.request_id), tuple(done.token_ids), done.finish_reason or "stop")  # type: ignore[attr-defined]


def engine_arguments(model: str, revision: str | None, spec: RunSpec, options: EngineOptions,
                     on_cpu: bool) -> dict[str, Any]:
    """All that vLLM is told of a run, by the names of its engine arguments."""
    converted = tokenizer_folder(model, revision)
    tokenizer = {"tokenizer_revision": revision} if converted is None else {"tokenizer": str(converted)}
    return {"model": model, "revision": revision, **tokenizer, "dtype": spec.target.dtype, "seed": 0,
            "max_model_len": spec.engine.max_model_len, "disable_log_stats": True,
            "worker_cls": f"distill_pipe.produce.capture.Capture{'CPU' if on_cpu else 'GPU'}Worker",
            "additional_config": {EXTRA_ARG: {"layers": list(spec.capture.layers)}},
            **_arguments(options, spec, on_cpu)}


def _arguments(options: EngineOptions, spec: RunSpec, on_cpu: bool) -> dict[str, object]:
    """The options as vLLM's arguments, those not given left out, with what a CPU needs."""
    given = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    if not on_cpu:
        return given
    if options.enable_expert_parallel:
        raise EngineStartError("expert parallelism needs GPUs: vLLM's kernels for experts on a CPU crash with it")
    # A prompt cut over two steps rewinds its sampling generator, which no CPU generator can do.
    chunked = spec.responses == "corpus" and options.max_num_batched_tokens is not None
    batch = options.max_num_batched_tokens or max(CPU_BATCH_TOKENS, spec.engine.max_model_len)
    return {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, **given,
            "enable_chunked_prefill": chunked, "max_num_batched_tokens": batch}


def _prompt_seed(seed: int, ordinal: int) -> int:
    """A sampling seed per prompt, so that a response does not depend on which prompts it ran beside."""
    return (seed * 1_000_003 + ordinal) % 2**63


def _reason(error: Exception) -> str:
    """The first lines of what vLLM says, without the values that it was given."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
    text = " ".join(lines).partition(" [type=")[0][:_REASON_CHARACTERS]
    return text if lines else type(error).__name__


def _ranges(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The half-open ranges where `mask` is set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
