"""A target so small that a slow engine gets through it: a random Llama with a tokenizer of single bytes.

Its weights are large for its size, so that the distributions of two positions, or of two layers, are nothing alike.
"""

from pathlib import Path

import torch

LAYERS, HIDDEN = 4, 64
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_byte_target(folder: Path) -> Path:
    """Write config, weights and tokenizer of a float32 target to `folder`; the same ones every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = _write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> int:
    """A token per byte after the special ones; returns how many."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_SPECIAL[1], eos_token=_SPECIAL[2], pad_token=_SPECIAL[0],
        chat_template=_TEMPLATE).save_pretrained(folder)
    return len(vocabulary)
