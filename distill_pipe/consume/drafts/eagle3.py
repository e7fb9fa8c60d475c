"""An EAGLE-3 draft (arXiv 2503.01840): fused states of three layers, one decoder layer, the same weights at every step.

Step 0 pairs the target's fused state of the anchor with the embedding of the token sampled there; a later step pairs
the draft's own state, before its final norm, with the token drafted last. Training runs these later steps too, on what
the step before gave out (training-time test), so the draft learns on its own states and not on the target's alone.
Weights are named as in released EAGLE-3 drafts. The embedding is the target's and frozen; the head is trained.

Shapes: T tokens, A anchors, R rows, H hidden size, D draft vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill_pipe.consume.drafts.decoder import Attention, Memory, SwiGlu
from distill_pipe.consume.drafts.draft import POSITIONS, Chain, Draft
from distill_pipe.consume.drafts.target_files import DraftConfig
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError


class Eagle3Draft(Draft):
    """Fuses auxiliary states, and runs one decoder layer over them and the newest tokens.

    Each auxiliary state is normalised before it is fused (`fc_norm`), because layers differ in size by orders of
    magnitude and single channels stick out by hundreds. The fusion starts as the deepest state alone: what the target
    is about to say at t is a better start than noise.
    """

    arch, recurrent = "eagle3", True
    unsaved = ("embed_tokens.weight",)

    def __init__(self, config: DraftConfig, layers: Sequence[int], positions: int = POSITIONS,
                 vocabulary: DraftVocabulary | None = None) -> None:
        super().__init__(config, layers, positions, vocabulary)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size).requires_grad_(False)
        self.fc_norm = nn.ModuleList(nn.RMSNorm(size, config.rms_norm_eps) for _ in self.layers)
        self.fc = nn.Linear(len(self.layers) * size, size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False)
        with torch.no_grad():
            self.fc.weight.zero_()[:, -size:] = torch.eye(size)

    @classmethod
    def layers_read(cls, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """All stored layers but the last of the target, unless that is the only one."""
        if not stored:
            raise UsageError("this dataset stores no hidden states; a draft cannot be trained on it")
        return tuple(n for n in stored if n != num_layers) or tuple(stored)

    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        """Start from the fused states."""
        return _Eagle3Chain(self, hidden, position_ids_T, cu_seqlens_B1)

    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        """The same head at every position."""
        logits_RD: Tensor = self.lm_head(self.norm(states_RH))
        return logits_RD

    def take_over(self, embedding_VH: Tensor, head_DH: Tensor, norm_H: Tensor) -> None:
        """Embedding, head and final norm."""
        self.embed_tokens.weight.copy_(embedding_VH)
        self.lm_head.weight.copy_(head_DH)
        self.norm.weight.copy_(norm_H)

    def engine_config(self) -> dict[str, object]:
        """A llama-style EAGLE-3 draft. The numbers of the auxiliary layers are canonical in vLLM too."""
        return self.config.block() | {
            "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
            "draft_vocab_size": self.draft_vocab_size, "fc_norm": True, "norm_before_residual": False,
            "attention_bias": False, "target_hidden_size": self.config.hidden_size,
            "num_aux_hidden_states": len(self.layers), "eagle_aux_hidden_state_layer_ids": list(self.layers)}


class _Eagle3Chain:
    def __init__(self, draft: Eagle3Draft, hidden: Mapping[int, Tensor], position_ids_T: Tensor,
                 cu_seqlens_B1: Tensor) -> None:
        self._draft, self._position_ids_A = draft, position_ids_T
        self._memory, dtype = Memory(position_ids_T, cu_seqlens_B1), draft.fc.weight.dtype
        normed = [norm(hidden[n].to(dtype)) for n, norm in zip(draft.layers, draft.fc_norm, strict=True)]
        # Autocast would leave the residual stream in the type of the products.
        self._state_AH: Tensor = draft.fc(torch.cat(normed, 1)).to(dtype)

    def step(self, next_ids_A: Tensor) -> Tensor:
        embeds_AH = self._draft.embed_tokens(next_ids_A)
        self._state_AH = self._draft.midlayer(embeds_AH, self._state_AH, self._position_ids_A, self._memory)
        self._position_ids_A = self._position_ids_A + 1
        return self._state_AH

    def narrow(self, anchors_A: Tensor) -> None:
        self._memory.narrow(anchors_A)
        self._state_AH, self._position_ids_A = self._state_AH[anchors_A], self._position_ids_A[anchors_A]


class Eagle3Layer(nn.Module):
    """A Llama decoder layer whose attention reads the token and the fused state side by side."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGlu(config)

    def forward(self, embeds_AH: Tensor, state_AH: Tensor, position_ids_A: Tensor, memory: Memory) -> Tensor:
        both_AI = torch.cat([self.input_layernorm(embeds_AH), self.hidden_norm(state_AH)], 1)
        state_AH = state_AH + self.self_attn(both_AI, position_ids_A, memory)
        out_AH: Tensor = state_AH + self.mlp(self.post_attention_layernorm(state_AH))
        return out_AH
