"""Tiny checkpoints of the real model classes, one per family, with random weights and the tokenizer of SmolLM2.

Each has what sets its family apart: grouped-query attention (Llama), norms of queries and keys (Qwen3), routed experts
(Qwen3-MoE), attention sinks and sliding windows (gpt-oss), latent attention, grouped routing with a bias, and a layer
for multi-token prediction (DeepSeek-V3). The weights are drawn so that every layer moves the residual stream and no
distribution is flat or certain: a matrix by 1 / sqrt(inputs), so that it keeps the size of what goes through it; the
head by three times that, which gives the likeliest token of the vocabulary about a tenth of the mass. The trade-off:
transformers saves less in a config than the published checkpoints have in theirs, so what vLLM reads is added by hand.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_pipe.produce.smollm2 import materialise_smollm2

VOCAB: Final = 49152
HIDDEN: Final = 128
LAYERS: Final = 5
_COMMON: Final = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}
# As in the published configs, scaled down to 512 positions. DeepSeek-V3 with plain rotary embeddings would be no target
# to compare on a CPU: vLLM's kernel for those rotates queries of more than one head wrongly when they come in three
# dimensions, as they do from latent attention (0.32).
_YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}


def write_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_COMMON, intermediate_size=256, num_key_value_heads=2, rms_norm_eps=1e-5)
    return _write(folder, LlamaForCausalLM(config))


def write_qwen3(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_COMMON, intermediate_size=256, num_key_value_heads=2, head_dim=64)
    return _write(folder, Qwen3ForCausalLM(config))


def write_qwen3_moe(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**_COMMON, intermediate_size=256, moe_intermediate_size=64, num_experts=8,
                            num_experts_per_tok=2, num_key_value_heads=2, head_dim=32, norm_topk_prob=True)
    return _write(folder, Qwen3MoeForCausalLM(config))


def write_gpt_oss(folder: Path) -> Path:
    """The window is shorter than the tests' prompts, so that it matters. The experts are MXFP4 ones, dequantised."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weights = _write_gpt_oss_without_experts(folder)
    for name, (blocks, scales) in _mxfp4_experts().items():
        weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    _save(weights, folder)
    return folder


def write_gpt_oss_mxfp4(folder: Path) -> Path:
    """The same as it is published: experts packed, everything else bfloat16."""
    weights = {name: tensor.bfloat16() for name, tensor in _write_gpt_oss_without_experts(folder).items()}
    for name, (blocks, scales) in _mxfp4_experts().items():
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _save(weights, folder)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _extend_config(folder, dtype="bfloat16",
                   quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": plain})
    return folder


def _write_gpt_oss_without_experts(folder: Path) -> dict[str, Tensor]:
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {key: value for key, value in _YARN.items() if "mscale" not in key}
    config = GptOssConfig(**_COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, head_dim=64,
                          num_key_value_heads=2, sliding_window=16, rope_parameters={**yarn, "truncate": False})
    weights = load_file(_write(folder, GptOssForCausalLM(config)) / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if not name.endswith(("gate_up_proj", "down_proj"))}


def _mxfp4_experts() -> dict[str, tuple[Tensor, Tensor]]:
    """By weight: 4-bit floats, two to a byte, in blocks of 32 inputs, and the exponent (plus 127) of each block."""
    generator = torch.Generator().manual_seed(1)
    experts = {}
    for layer in range(LAYERS):
        for name, outputs, inputs in (("gate_up_proj", 2 * 64, HIDDEN), ("down_proj", HIDDEN, 64)):
            shape = (8, outputs, inputs // 32)
            experts[f"model.layers.{layer}.mlp.experts.{name}"] = (
                torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
                torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8))
    return experts


def write_deepseek_v3(folder: Path) -> Path:
    """Kernels for latent attention know one size of latent, 512 + 64. The layer for multi-token prediction is made of
    the weights of the last layer, so that the engine would find everything if it took the layer for one of its own."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_COMMON, intermediate_size=256, moe_intermediate_size=64, num_key_value_heads=4, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=96, qk_rope_head_dim=64, qk_nope_head_dim=64,
        v_head_dim=64, num_mtp_layers=1, rope_parameters=dict(_YARN))
    _write(folder, DeepseekV3ForCausalLM(config))
    _extend_config(folder, scoring_func="sigmoid", topk_method="noaux_tc")
    weights = load_file(folder / "model.safetensors")
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    weights |= {extra + name.removeprefix(last): tensor.clone() for name, tensor in weights.items()
                if name.startswith(last)}
    weights[extra + "eh_proj.weight"] = torch.eye(HIDDEN).repeat(1, 2)
    weights[extra + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[extra + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    weights |= {f"{extra}{name}.weight": torch.ones(HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm")}
    _save(weights, folder)
    return folder


FAMILIES: Final[dict[str, Callable[[Path], Path]]] = {
    "llama": write_llama, "qwen3": write_qwen3, "qwen3-moe": write_qwen3_moe, "gpt-oss": write_gpt_oss,
    "deepseek-v3": write_deepseek_v3,
}


def _write(folder: Path, model: torch.nn.Module) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            tensor.copy_(_draw(name, tensor, generator))
    model.save_pretrained(folder)
    for source in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(materialise_smollm2() / source, folder)
    return folder


def _save(weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if like.ndim == 1:
        return 0.2 * noise  # biases and sinks
    if "embed_tokens" in name:
        return noise
    return noise * (3 if "lm_head" in name else 1) / math.sqrt(like.shape[-1])


def _extend_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
