"""Hours of a run on given GPUs by arithmetic: how fast the target could read and write, and how near engines come.

Reading a prompt is bound by arithmetic, two operations per parameter at work. Writing is bound by memory: each step
reads all weights and the cache of every sequence. The shares of the data sheet's speed that engines reach are
assumptions, and named in the plan; a probe measures them. The trade-off: no model of the network between devices, so a
layout over machines is slower than this says.
"""

from dataclasses import dataclass

from msgspec import Struct

from distill_pipe.produce.gpus import Gpu
from distill_pipe.produce.memory import Memory
from distill_pipe.produce.sample import Totals
from distill_pipe.store.spec import Responses

FLOPS_SHARE, BANDWIDTH_SHARE = 0.4, 0.5


class Throughput(Struct, frozen=True, kw_only=True):
    """Tokens per second of one engine, reading prompts and writing responses in batches of `batch`, and hours of the
    run on all engines."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    batch: int
    hours: float

    @property
    def assumption(self) -> str:
        return (f"hours assume {FLOPS_SHARE:.0%} of a GPU's bfloat16 operations for prompts, {BANDWIDTH_SHARE:.0%} of "
                f"its memory bandwidth for responses, {self.batch} sequences at once; --probe measures")


@dataclass(frozen=True, slots=True)
class Work:
    """What is run: the totals, who writes the responses, and the most sequences at once."""

    totals: Totals
    responses: Responses
    max_num_seqs: int


def estimate(work: Work, memory: Memory, active: int, gpu: Gpu) -> Throughput:
    """Hours on `memory.engines` engines of a target of which `active` parameters work on each token."""
    totals, devices = work.totals, memory.devices_per_engine
    operations = FLOPS_SHARE * gpu.flops * devices
    bandwidth = BANDWIDTH_SHARE * gpu.bandwidth * devices
    batch = max(min(work.max_num_seqs, memory.fitting_sequences or 1, round(totals.trace / memory.engines)), 1)
    prefill = operations / (2 * active)
    cache = batch * memory.kv_per_token * totals.token / totals.trace
    step = (memory.weights + cache) / bandwidth + batch / prefill
    written = totals.row if work.responses == "target" else 0.0
    seconds = (totals.token - written) / prefill + written * step / batch
    return Throughput(prefill_tokens_per_second=prefill, decode_tokens_per_second=batch / step, batch=batch,
                      hours=seconds / memory.engines / 3600)
