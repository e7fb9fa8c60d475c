"""What both caches of NeMo Automodel share (NVIDIA-NeMo/Automodel 0.7, `components/datasets/llm/offline_cache.py`).

    manifest.json                written last; names the shape, the layers and the vocabulary of the cache
    shard-000000.safetensors     16 samples stacked, all of one length; only the last shard may be shorter

Every trace is cut, or padded with zeros, to `seq_length`, which has to be the recipe's. Layers are numbered from 0.
The recipe's `mask_generation_prompt` has to be true: a template's prefix of an answer is not in our loss masks.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from distill_pipe.consume.drafts.target_files import read_weights
from distill_pipe.consume.exporters.record import Sample
from distill_pipe.consume.tensor_file import save_tensors
from distill_pipe.errors import UsageError
from distill_pipe.store.disk import whole_file

# A shard is held in memory while it is made: 1 GB for 2,048 tokens of an 8B target.
SAMPLES_PER_SHARD = 16
MASK_NOTE = "set mask_generation_prompt: true in the recipe, which the loss masks of this dataset correspond to"
DTYPE_NAMES: dict[str, str] = {"bf16": "bf16", "f32": "fp32"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
MASK_OPTIONS: dict[str, object] = {"mask_reasoning_content": False, "mask_generation_prompt": True}


def cache_file(first: int) -> str:
    """The shard whose first sample has this number."""
    return f"shard-{first // SAMPLES_PER_SHARD:06d}.safetensors"


def write_cache_file(path: Path, samples: Sequence[Sample]) -> None:
    """The samples of a shard, stacked."""
    save_tensors(path, {name: torch.stack([s[name] for s in samples]) for name in samples[0]})


def write_manifest(folder: Path, version: int, fields: dict[str, object]) -> None:
    """manifest.json, which makes the folder a cache."""
    manifest = {"format_version": version, "shard_size": SAMPLES_PER_SHARD, "split": None, "shuffle_seed": 0}
    with whole_file(folder / "manifest.json") as path:
        path.write_bytes(msgspec.json.encode(manifest | MASK_OPTIONS | fields))


def target_folder(folder: Path | None, trainer: str) -> Path:
    """The target's folder.

    Raises:
        UsageError: it was not given.
    """
    if folder is None:
        raise UsageError(f"{trainer} trains without the target and wants its embedding in the export: give the "
                         "target's folder with --target")
    return folder


def target_tables(folder: Path) -> tuple[Tensor, Tensor]:
    """The target's embedding and head, `[V, H]` each; the same tensor where they are tied.

    Raises:
        UsageError: the folder holds no such weights.
    """
    weights = read_weights(folder, (_EMBEDDING, _HEAD))
    if _EMBEDDING not in weights:
        raise UsageError(f"{folder} holds no weight named {_EMBEDDING}")
    return weights[_EMBEDDING], weights.get(_HEAD, weights[_EMBEDDING])
