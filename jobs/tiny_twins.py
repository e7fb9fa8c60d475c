"""A tiny twin of every preset: a random checkpoint of the same class, with the preset's rules and none of its size.

    python jobs/tiny_twins.py FOLDER [NAME ...]
    DISTILL_PIPE_TARGETS=FOLDER distill-pipe generate --target deepseek-v3 ...

FOLDER then holds a checkpoint per target and, for `DISTILL_PIPE_TARGETS`, a preset of the same name that leads to it:
same layers by word, same limits of the class, same kind of chat template (one that prints the date, or knows thoughts).
The weights are drawn so that every layer moves the residual stream and no distribution is flat or certain. The
trade-off: they are float32 and not quantised, since few kernels for FP8 and MXFP4 run on a CPU, and the tokenizer is
SmolLM2's under the name of the target's class.
"""

import argparse
import base64
import json
import math
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill_pipe.produce import tiktoken_file
from distill_pipe.produce.model_config import ModelConfig, read_config
from distill_pipe.produce.preset import Preset, load_preset, preset_names
from distill_pipe.produce.smollm2 import materialise_smollm2

VOCAB: Final = 49152
HIDDEN: Final = 128
LAYERS: Final = 5
COMMON: Final = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}
# As in the published configs, scaled down to 512 positions. DeepSeek-V3 with plain rotary embeddings would be no target
# to compare on a CPU: vLLM's kernel for those rotates queries of more than one head wrongly when they come in three
# dimensions, as they do from latent attention (0.32).
YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
               "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}
# Of the presets' tokenizers; Kimi-K2's class is a Python file of its repository, which nobody runs.
TOKENIZERS: Final = {"llama": "PreTrainedTokenizerFast", "gpt-oss": "PreTrainedTokenizerFast",
                     "qwen3": "Qwen2TokenizerFast", "deepseek": "LlamaTokenizerFast", "glm": "PreTrainedTokenizerFast",
                     "kimi": tiktoken_file.CLASS, "smollm2": "PreTrainedTokenizerFast"}
_TURN = ("<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n"
         "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n")
_TEMPLATE = ("%s{%% for m in messages %%}%s{%% endfor %%}"
             "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}")
_DATE = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"


def write_twin(name: str, folder: Path) -> Path:
    """Write the checkpoint of a twin to `folder/NAME`, and its preset to `folder/NAME.yaml`.

    Raises:
        SystemExit: there is no such preset, or it is of a class that has no twin.
    """
    preset = load_preset(name)
    if preset is None or preset.config is None:
        raise SystemExit(f"{name} is not a preset with facts; known are {', '.join(preset_names())}")
    made = folder / name
    write_checkpoint(made, _model(preset.config, name))
    _finish(made, preset.config, name)
    _write_tokenizer(made, preset, name)
    _write_preset(folder / f"{name}.yaml", preset, made)
    return made


def write_checkpoint(folder: Path, model: torch.nn.Module) -> Path:
    """Save a model of transformers with drawn weights and the tokenizer of SmolLM2."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            tensor.copy_(_draw(name, tensor, generator))
    model.save_pretrained(folder)  # type: ignore[operator]
    for source in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(materialise_smollm2() / source, folder)
    return folder


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write a checkpoint's weights anew."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def extend_config(folder: Path, **settings: object) -> None:
    """Add what transformers leaves out of a config and vLLM reads."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def add_multi_token_layer(folder: Path) -> None:
    """A layer for multi-token prediction of the weights of the last one, so that the engine would find everything if it
    took the layer for one of its own."""
    weights = load_file(folder / "model.safetensors")
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    weights |= {extra + name.removeprefix(last): tensor.clone() for name, tensor in weights.items()
                if name.startswith(last)}
    weights[extra + "eh_proj.weight"] = torch.eye(HIDDEN).repeat(1, 2)
    weights[extra + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[extra + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    weights |= {f"{extra}{name}.weight": torch.ones(HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm")}
    save_weights(weights, folder)


def _model(config: ModelConfig, name: str) -> torch.nn.Module:
    """A model of the preset's class: grouped heads stay grouped, experts routed and shared, latents latent."""
    import transformers

    grouped = (config.num_key_value_heads or 0) < (config.num_attention_heads or 0)
    sizes: dict[str, Any] = COMMON | {"intermediate_size": 256, "num_key_value_heads": 2 if grouped else 4}
    if config.kv_lora_rank is None:
        sizes["head_dim"] = 64
    if config.experts:
        sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
    if config.n_routed_experts:
        sizes |= {"n_routed_experts": 8, "n_shared_experts": config.n_shared_experts, "first_k_dense_replace": 1,
                  "routed_scaling_factor": 2.5}
    architecture = config.architectures[0]
    if architecture == "Qwen3MoeForCausalLM":
        sizes |= {"num_experts": 8, "norm_topk_prob": True}
    elif architecture == "GptOssForCausalLM":
        yarn = {key: value for key, value in YARN.items() if "mscale" not in key}
        sizes |= {"num_local_experts": 8, "intermediate_size": 64, "sliding_window": 16,
                  "rope_parameters": {**yarn, "truncate": False}}
    elif architecture == "DeepseekV3ForCausalLM":
        # Kernels for latent attention know one size of latent, 512 + 64.
        groups = (1, 1) if name == "kimi-k2" else (2, 1)
        sizes |= {"kv_lora_rank": 512, "q_lora_rank": 96, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
                  "v_head_dim": 64, "n_group": groups[0], "topk_group": groups[1], "rope_parameters": dict(YARN),
                  "num_mtp_layers": config.num_nextn_predict_layers or 0}
    elif architecture == "Glm4MoeForCausalLM":
        sizes |= {"attention_bias": True, "use_qk_norm": True, "norm_topk_prob": True, "n_group": 1, "topk_group": 1}
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    model: torch.nn.Module = getattr(transformers, architecture)(kind(**sizes))
    return model


def _finish(folder: Path, config: ModelConfig, name: str) -> None:
    if config.architectures == ("DeepseekV3ForCausalLM",):
        extend_config(folder, scoring_func="sigmoid", topk_method="noaux_tc",
                      **{"model_type": "kimi_k2"} if name == "kimi-k2" else {})
        if config.num_nextn_predict_layers:
            add_multi_token_layer(folder)


def _write_tokenizer(folder: Path, preset: Preset, name: str) -> None:
    kind = next(kind for family, kind in TOKENIZERS.items() if name.startswith(family))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    dated = _DATE if "a date" in (preset.chat_template or "") else ""
    (folder / "chat_template.jinja").write_text(_TEMPLATE % (dated, _TURN))
    if kind == tiktoken_file.CLASS:
        _as_tiktoken(folder)


def _as_tiktoken(folder: Path) -> None:
    """The tokenizer as Kimi-K2 has it: a file of ranks, with special tokens after all others."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    by_id = sorted(tokenizer["model"]["vocab"].items(), key=itemgetter(1))
    ranked = [bytes(byte_of[c] for c in token) for token, _ in by_id if token not in special]
    (folder / tiktoken_file.FILE).write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank)
                                                       for rank, token in enumerate(ranked)))
    added = {len(ranked) + i: token for i, token in enumerate(sorted(special))}
    ids = {token: number for number, token in added.items()}
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {number: {"content": token, "special": True} for number, token in added.items()}}))
    ends = {"bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|im_end|>"]}
    extend_config(folder, **ends)
    (folder / "generation_config.json").write_text(json.dumps(ends))
    path.unlink()


def _write_preset(path: Path, preset: Preset, made: Path) -> None:
    """The preset with what is small in place of what is large."""
    found = read_config(made)
    facts = {name: getattr(found, name) for name, value in msgspec.structs.asdict(preset.config).items()  # type: ignore[type-var]
             if value not in (None, ()) and getattr(found, name) is not None}
    small = msgspec.to_builtins(preset) | {
        "model": str(made.absolute()), "revision": None, "quantization": None, "dtype": "float32",
        "max_model_len": 192, "response_tokens": 16, "config": msgspec.to_builtins(facts),
        "sampling": {"temperature": 1.0, "max_tokens": 16}, "engine": {"max_num_seqs": 4}}
    path.write_text(yaml.safe_dump(small))


def _draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix by 1 / sqrt(inputs), so that it keeps the size of what goes through it; the head by three times that,
    which gives the likeliest token of the vocabulary about a tenth of the mass."""
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if like.ndim == 1:
        return 0.2 * noise  # biases and sinks
    if "embed_tokens" in name:
        return noise
    return noise * (3 if "lm_head" in name else 1) / math.sqrt(like.shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Tiny random checkpoints of the classes of all presets.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets; all that hold facts when left out")
    given = parser.parse_args()
    known = [name for name in preset_names() if (preset := load_preset(name)) and preset.config is not None]
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.names or known:
        print(write_twin(name, given.folder))


if __name__ == "__main__":
    main()
