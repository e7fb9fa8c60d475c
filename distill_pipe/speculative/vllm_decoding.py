"""The same count by vLLM itself: its own speculative decoding with the same checkpoint, and its own counters.

What vLLM 0.32 does on a CPU with a draft of each kind:

| kind             | T = 0                              | T > 0                                               |
|------------------|------------------------------------|-----------------------------------------------------|
| `eagle3`         | yes, truncated vocabulary too      | no: logits are divided by memory that nobody wrote  |
| `medusa`, `mtp`  | yes, with the whole vocabulary     | no, for the same reason                             |
| `mlp_speculator` | no: the class is not registered    | no                                                  |

(T > 0: `_expand_kernel_impl` of `cpu_triton_utils`.) On GPUs both temperatures work with `rejection_sample_method`
"standard" and `draft_sample_method` "probabilistic"; a draft that is sampled greedily, which is vLLM's default, is
lossless too and accepts less than the draft was trained for. For an `mtp` draft the target must be started with
`--hf-overrides '{"num_nextn_predict_layers": 1}'`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from distill_pipe.consume.drafts.checkpoint import read_record
from distill_pipe.errors import EngineStartError, UsageError
from distill_pipe.produce.targets import Target
from distill_pipe.speculative.bench import EngineCount

METHODS: Final = {"eagle3": "eagle3", "medusa": "medusa", "mtp": "mtp"}
_DRAFTS, _ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
_KV_CACHE_BYTES = 256 << 20


def decode_with_vllm(target: Target, draft_folder: Path, prompts: Sequence[Sequence[int]], drafted: int,
                     max_tokens: int) -> EngineCount:
    """Decode prompts, given as token ids, greedily in an engine of this process, which stays until the process ends.

    Raises:
        UsageError: vLLM cannot run a draft of this kind.
        EngineStartError: vLLM refuses the target or the checkpoint.
    """
    arch = read_record(draft_folder).arch
    if arch not in METHODS:
        raise UsageError(f"vLLM 0.32 does not register the model class of {arch} drafts; use bench-draft")
    engine = _engine(target, {"model": str(draft_folder), "method": METHODS[arch], "num_speculative_tokens": drafted})
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    before = _counters(engine)
    outputs = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], greedy, use_tqdm=False)
    steps, accepted = (now - was for now, was in zip(_counters(engine), before, strict=True))
    return EngineCount(drafted=drafted, steps=steps, accepted=accepted, tau=1 + accepted / max(steps, 1),
                       texts=tuple(tuple(o.outputs[0].token_ids) for o in outputs))


def _engine(target: Target, speculative: dict[str, object]) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    arguments: dict[str, object] = {}
    if speculative["method"] == "mtp":
        # vLLM takes a target to come with its MTP layers, and looks in the target's config for their number.
        arguments["hf_overrides"] = {"num_nextn_predict_layers": 1}
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        arguments |= {"kv_cache_memory_bytes": _KV_CACHE_BYTES, "enforce_eager": True}
    try:
        return LLM(model=target.model, revision=target.revision, dtype="float32", seed=0, disable_log_stats=False,
                   max_model_len=min(target.max_model_len, 1024), speculative_config=speculative, **arguments)
    except Exception as error:  # vLLM itself reports a worker that failed as a plain Exception
        raise EngineStartError(f"vLLM cannot run {target.model} with this draft: {error}") from error


def _counters(engine: Any) -> tuple[int, int]:
    found = {metric.name: metric.value for metric in engine.get_metrics() if metric.name in (_DRAFTS, _ACCEPTED)}
    return int(found.get(_DRAFTS, 0)), int(found.get(_ACCEPTED, 0))
