"""Multi-token prediction as DeepSeek-V3 does it (arXiv 2412.19437 section 2.2), with a dense block.

A step norms the embedding of the newest token and the state, joins and projects them, and runs one decoder layer. The
state of step 0 is the target's last one behind its final norm; a later step reads what the step before gave out, with
the same weights, as engines do when they draft several tokens from one module. Embedding and head are the target's and
stay frozen. Checkpoints follow MiMo, the layout with a dense block that vLLM loads: its attention has biases, and the
embedding at position 0 is masked.

Shapes: T tokens, A anchors, R rows, H hidden size, D draft vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distill_pipe.consume.drafts.decoder import Attention, Memory, SwiGlu
from distill_pipe.consume.drafts.draft import POSITIONS, Chain, Draft, last_layer
from distill_pipe.consume.drafts.target_files import DraftConfig
from distill_pipe.consume.vocabulary import DraftVocabulary


class MtpDraft(Draft):
    """One prediction module between the target's embedding and its head."""

    arch, recurrent = "mtp", True

    def __init__(self, config: DraftConfig, layers: Sequence[int], positions: int = POSITIONS,
                 vocabulary: DraftVocabulary | None = None) -> None:
        super().__init__(config, layers, positions, vocabulary)
        self.model = _MtpModel(config)
        self.lm_head = nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False).requires_grad_(False)

    @classmethod
    def layers_read(cls, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """The last layer."""
        return last_layer(stored, num_layers, cls.arch)

    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        """Start from the target's final state."""
        return _MtpChain(self, self.final_state(hidden), position_ids_T, Memory(position_ids_T, cu_seqlens_B1))

    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        """The target's head; the module ends in a norm of its own."""
        logits_RD: Tensor = self.lm_head(states_RH)
        return logits_RD

    def take_over(self, embedding_VH: Tensor, head_DH: Tensor, norm_H: Tensor) -> None:
        """Embedding, head, and the norm before the head."""
        self.model.embed_tokens.weight.copy_(embedding_VH)
        self.lm_head.weight.copy_(head_DH)
        self.model.only_layer.final_layernorm.weight.copy_(norm_H)

    def engine_config(self) -> dict[str, object]:
        """vLLM turns `MiMoForCausalLM` of any config into its MTP model, and takes embedding and head from the target.
        """
        return self.config.block() | {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2",
                                      "num_hidden_layers": 1, "num_nextn_predict_layers": 1}


class _MtpChain:
    def __init__(self, draft: MtpDraft, state_TH: Tensor, position_ids_T: Tensor, memory: Memory) -> None:
        self._model, self._memory = draft.model, memory
        self._state_AH, self._position_ids_A = state_TH, position_ids_T

    def step(self, next_ids_A: Tensor) -> Tensor:
        embeds_AH = self._model.embed_tokens(next_ids_A).masked_fill(self._position_ids_A[:, None] == 0, 0.0)
        self._state_AH = self._model.only_layer(embeds_AH, self._state_AH, self._position_ids_A, self._memory)
        self._position_ids_A = self._position_ids_A + 1
        return self._state_AH

    def narrow(self, anchors_A: Tensor) -> None:
        self._memory.narrow(anchors_A)
        self._state_AH, self._position_ids_A = self._state_AH[anchors_A], self._position_ids_A[anchors_A]


class _MtpModel(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False)
        self.mtp_layers = nn.ModuleList([MtpLayer(config)])

    @property
    def only_layer(self) -> "MtpLayer":
        return cast(MtpLayer, self.mtp_layers[0])


class MtpLayer(nn.Module):
    """Norms, projection and one decoder layer. The projection starts as the state alone."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = nn.RMSNorm(size, eps)
        self.hidden_layernorm = nn.RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = Attention(config, size, bias=True)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = SwiGlu(config)
        self.final_layernorm = nn.RMSNorm(size, eps)
        with torch.no_grad():
            self.input_proj.weight[:, :size] = torch.eye(size)

    def forward(self, embeds_AH: Tensor, state_AH: Tensor, position_ids_A: Tensor, memory: Memory) -> Tensor:
        joined_AH2 = torch.cat([self.hidden_layernorm(state_AH), self.token_layernorm(embeds_AH)], 1)
        # Autocast would leave the residual stream in the type of the products.
        state_AH = self.input_proj(joined_AH2).to(state_AH.dtype)
        state_AH = state_AH + self.self_attn(self.input_layernorm(state_AH), position_ids_A, memory)
        state_AH = state_AH + self.mlp(self.post_attention_layernorm(state_AH))
        out_AH: Tensor = self.final_layernorm(state_AH)
        return out_AH
