"""Tiny checkpoints of the real model classes, one per family, with random weights and the tokenizer of SmolLM2.

Each has what sets its family apart: grouped-query attention (Llama), norms of queries and keys (Qwen3), routed experts
(Qwen3-MoE), attention sinks and sliding windows (gpt-oss), latent attention, grouped routing with a bias, and a layer
for multi-token prediction (DeepSeek-V3). The weights are drawn so that every layer moves the residual stream and no
distribution is flat or certain: a matrix by 1 / sqrt(inputs), so that it keeps the size of what goes through it; the
head by three times that, which gives the likeliest token of the vocabulary about a tenth of the mass. The trade-off:
transformers saves less in a config than the published checkpoints have in theirs, so what vLLM reads is added by hand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from tiny_twins import (
    COMMON,
    HIDDEN,
    LAYERS,
    VOCAB,
    YARN,
    add_multi_token_layer,
    extend_config,
    save_weights,
    write_checkpoint,
)
from torch import Tensor

__all__ = ["FAMILIES", "HIDDEN", "LAYERS", "VOCAB"]


def write_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**COMMON, intermediate_size=256, num_key_value_heads=2, rms_norm_eps=1e-5)
    return write_checkpoint(folder, LlamaForCausalLM(config))


def write_qwen3(folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**COMMON, intermediate_size=256, num_key_value_heads=2, head_dim=64)
    return write_checkpoint(folder, Qwen3ForCausalLM(config))


def write_qwen3_moe(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**COMMON, intermediate_size=256, moe_intermediate_size=64, num_experts=8,
                            num_experts_per_tok=2, num_key_value_heads=2, head_dim=32, norm_topk_prob=True)
    return write_checkpoint(folder, Qwen3MoeForCausalLM(config))


def write_gpt_oss(folder: Path) -> Path:
    """The window is shorter than the tests' prompts, so that it matters. The experts are MXFP4 ones, dequantised."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weights = _write_gpt_oss_without_experts(folder)
    for name, (blocks, scales) in _mxfp4_experts().items():
        weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_weights(weights, folder)
    return folder


def write_gpt_oss_mxfp4(folder: Path) -> Path:
    """The same as it is published: experts packed, everything else bfloat16."""
    weights = {name: tensor.bfloat16() for name, tensor in _write_gpt_oss_without_experts(folder).items()}
    for name, (blocks, scales) in _mxfp4_experts().items():
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_weights(weights, folder)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    extend_config(folder, dtype="bfloat16",
                   quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": plain})
    return folder


def _write_gpt_oss_without_experts(folder: Path) -> dict[str, Tensor]:
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {key: value for key, value in YARN.items() if "mscale" not in key}
    config = GptOssConfig(**COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, head_dim=64,
                          num_key_value_heads=2, sliding_window=16, rope_parameters={**yarn, "truncate": False})
    weights = load_file(write_checkpoint(folder, GptOssForCausalLM(config)) / "model.safetensors")
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
        **COMMON, intermediate_size=256, moe_intermediate_size=64, num_key_value_heads=4, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=96, qk_rope_head_dim=64, qk_nope_head_dim=64,
        v_head_dim=64, num_mtp_layers=1, rope_parameters=dict(YARN))
    write_checkpoint(folder, DeepseekV3ForCausalLM(config))
    extend_config(folder, scoring_func="sigmoid", topk_method="noaux_tc")
    add_multi_token_layer(folder)
    return folder


FAMILIES: Final[dict[str, Callable[[Path], Path]]] = {
    "llama": write_llama, "qwen3": write_qwen3, "qwen3-moe": write_qwen3_moe, "gpt-oss": write_gpt_oss,
    "deepseek-v3": write_deepseek_v3,
}

