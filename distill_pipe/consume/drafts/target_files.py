"""What a draft takes from its target's checkpoint: sizes out of config.json, and three weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from distill_pipe.errors import UsageError

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class RopeParameters(msgspec.Struct, frozen=True):
    """`rope_parameters` of a target's config.json."""

    rope_theta: float = 10_000.0


class DraftConfig(msgspec.Struct, frozen=True):
    """What the draft takes over from the target's config.json; other fields there are ignored."""

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: RopeParameters = RopeParameters()
    max_position_embeddings: int = 4096

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def theta(self) -> float:
        return self.rope_theta or self.rope_parameters.rope_theta

    def block(self) -> dict[str, object]:
        """The fields of config.json that describe one decoder layer of these sizes."""
        return {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size, "hidden_act": "silu",
                "num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_size, "rms_norm_eps": self.rms_norm_eps, "vocab_size": self.vocab_size,
                "rope_theta": self.theta, "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
                "max_position_embeddings": self.max_position_embeddings, "tie_word_embeddings": False}


def read_config(folder: Path) -> DraftConfig:
    """The sizes of a target, from its config.json.

    Raises:
        UsageError: there is none, or it lacks a field.
    """
    try:
        return msgspec.json.decode((folder / "config.json").read_bytes(), type=DraftConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder}/config.json cannot be used: {error}") from error


def read_tables(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The target's embedding `[V, H]`, its lm_head `[V, H]` (the embedding where they are tied) and its final norm.

    Raises:
        UsageError: the folder lacks the embedding or the norm.
    """
    weights = read_weights(folder, (EMBEDDING, HEAD, NORM))
    absent = {EMBEDDING, NORM} - set(weights)
    if absent:
        raise UsageError(f"{folder} holds no weight named {' or '.join(sorted(absent))}")
    return weights[EMBEDDING], weights.get(HEAD, weights[EMBEDDING]), weights[NORM]


def read_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of the named weights that a target folder holds, from one safetensors file or an indexed set of them.

    Raises:
        UsageError: the folder holds no safetensors weights.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        files = {n: f for n, f in json.loads(index.read_bytes())["weight_map"].items() if n in names}
    elif single.exists():
        files = dict.fromkeys(names, single.name)
    else:
        raise UsageError(f"{folder} holds neither {single.name} nor {index.name}")
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as weights:
            stored = set(weights.keys())
            found |= {n: weights.get_tensor(n) for n, f in files.items() if f == file and n in stored}
    return found
