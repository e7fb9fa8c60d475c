"""The fields of config.json that capture and its memory depend on, and how many parameters they make.

The names are those of Hugging Face, so a preset's facts and a real config.json are compared field by field. The
trade-off: parameters are counted for the attention (grouped or latent) and MLPs (dense, routed, shared) of the families
that we have presets for; norms, biases and what else is small are left out, which is less than 0.2 % of a target.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

_FP8_BLOCK, _MXFP4_BLOCK = 128 * 128, 32
_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


class ModelConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What config.json says; a family has some of these fields and lacks others."""

    architectures: tuple[str, ...] = ()
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    vocab_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_nextn_predict_layers: int | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None

    @property
    def experts(self) -> int:
        """Routed experts of a layer, by any of their three names; 0 where the MLPs are dense."""
        return self.num_experts or self.num_local_experts or self.n_routed_experts or 0

    @property
    def key_value_heads(self) -> int:
        """Heads whose keys and values a device may hold apart: latent attention has one vector for all."""
        return 1 if self.kv_lora_rank is not None else self.num_key_value_heads or self.num_attention_heads or 1

    @property
    def cache_elements(self) -> int:
        """Numbers in the KV cache per token and layer, over all heads."""
        if self.kv_lora_rank is not None:
            # Multi-head latent attention keeps one compressed vector, and the rotary part beside it.
            return self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        return 2 * self.key_value_heads * self._head_dim

    @property
    def _head_dim(self) -> int:
        return self.head_dim or (self.hidden_size or 0) // (self.num_attention_heads or 1)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many, by how they are quantised: embeddings and head never are, experts always where anything is."""

    embeddings: int
    experts: int
    other: int
    active: int

    @property
    def total(self) -> int:
        return self.embeddings + self.experts + self.other

    def weight_bytes(self, dtype: str, quantization: str | None) -> int:
        """Bytes in the engine: fp8 with a float32 scale per block of 128 x 128, or mxfp4 with a byte per 32 (experts
        alone), the rest in `dtype`."""
        width = _WIDTH[dtype]
        if quantization == "fp8":
            return self.embeddings * width + (self.experts + self.other) * (_FP8_BLOCK + 4) // _FP8_BLOCK
        if quantization == "mxfp4":
            return (self.embeddings + self.other) * width + self.experts * (_MXFP4_BLOCK // 2 + 1) // _MXFP4_BLOCK
        return self.total * width


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of the target without layers for multi-token prediction, which the engine does not load."""
    hidden, layers = config.hidden_size or 0, config.num_hidden_layers or 0
    embeddings = hidden * (config.vocab_size or 0)
    dense_layers = layers if not config.experts else config.first_k_dense_replace or 0
    expert = 3 * hidden * (config.moe_intermediate_size or config.intermediate_size or 0)
    sparse_layers = layers - dense_layers
    dense = dense_layers * 3 * hidden * (config.intermediate_size or 4 * hidden)
    shared = sparse_layers * ((config.n_shared_experts or 0) * expert + hidden * config.experts)
    other = layers * _attention(config, hidden) + dense + shared
    used = sparse_layers * (config.num_experts_per_tok or 0) * expert
    return Parameters(embeddings=embeddings * (1 if config.tie_word_embeddings else 2),
                      experts=sparse_layers * config.experts * expert, other=other, active=embeddings + other + used)


def _attention(config: ModelConfig, hidden: int) -> int:
    """Of one layer."""
    heads = config.num_attention_heads or 1
    if config.kv_lora_rank is None:
        return 2 * hidden * config._head_dim * (heads + config.key_value_heads)
    rope, nope = config.qk_rope_head_dim or 0, config.qk_nope_head_dim or 0
    value, latent = config.v_head_dim or 0, config.kv_lora_rank
    query = config.q_lora_rank
    queries = hidden * heads * (nope + rope) if query is None else query * (hidden + heads * (nope + rope))
    return queries + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden


def read_config(folder: Path) -> ModelConfig:
    """The fields of a folder's config.json, those of its text part first; none where a field is not what it should be,
    since every head is then taken to have its own keys and values, the most that it can need."""
    try:
        plain = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, object])
        text = plain.get("text_config")
        return msgspec.convert(plain | text if isinstance(text, dict) else plain, ModelConfig)
    except (OSError, msgspec.DecodeError):
        return ModelConfig()


def differing_fields(expected: ModelConfig, found: ModelConfig) -> list[str]:
    """One line per field that a preset states and config.json has otherwise."""
    return [f"{name}: the preset has {wanted!r}, config.json {getattr(found, name)!r}"
            for name, wanted in msgspec.structs.asdict(expected).items()
            if wanted not in (None, ()) and wanted != getattr(found, name)]
