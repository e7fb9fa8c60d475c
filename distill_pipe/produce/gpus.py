"""GPUs by name: their memory and speed, and what `--gpus 8xH200` means.

Memory is what the driver reports of a card, speed what its data sheet states: dense bfloat16, no sparsity. The
trade-off: four types with known layouts, not every card on the market; others are described by `--gpu-memory`.
"""

import re
from typing import Final

from msgspec import Struct

from distill_pipe.errors import UsageError

GPUS_PER_NODE: Final = 8
_GIVEN = re.compile(r"^(\d+)\s*x\s*([A-Za-z0-9-]+)$")


class Gpu(Struct, frozen=True, kw_only=True):
    """A type of GPU: bytes of memory, bytes per second out of it, and floating-point operations per second."""

    name: str
    bytes: int
    bandwidth: float
    flops: float


class GpuSet(Struct, frozen=True, kw_only=True):
    """So many GPUs of one type."""

    count: int
    gpu: Gpu


GPUS: Final = {gpu.name: gpu for gpu in (
    Gpu(name="A100-80", bytes=81920 << 20, bandwidth=2.0e12, flops=312e12),
    Gpu(name="H100-80", bytes=81559 << 20, bandwidth=3.35e12, flops=989e12),
    Gpu(name="H200", bytes=143771 << 20, bandwidth=4.8e12, flops=989e12),
    Gpu(name="B200", bytes=183359 << 20, bandwidth=7.7e12, flops=2250e12),
)}
_ALSO: Final = {"A100": "A100-80", "A100-80GB": "A100-80", "H100": "H100-80", "H100-80GB": "H100-80"}


def parse_gpus(text: str) -> GpuSet:
    """`8xH200` as a number and a type.

    Raises:
        UsageError: it is not written so, or the type is not known.
    """
    found = _GIVEN.match(text.strip())
    if found is None or int(found[1]) < 1:
        raise UsageError(f"--gpus {text}: write a number and a type, for example 8xH200")
    name = found[2].upper()
    gpu = GPUS.get(_ALSO.get(name, name))
    if gpu is None:
        raise UsageError(f"--gpus {text}: the type is not one of {', '.join(GPUS)}; for another, leave --gpus out and "
                         "give --gpu-memory and the engine's parallel sizes")
    return GpuSet(count=int(found[1]), gpu=gpu)
