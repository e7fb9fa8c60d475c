"""An MLP speculator (arXiv 2404.19124): one small layer per position, which carries a state from token to token.

Position k mixes the state of the position before with the embedding of the newest token, both in fixed shares, norms
and bends the sum, and has a head of its own. Unlike Medusa it knows which token was drafted last; unlike EAGLE it looks
back no further than its state. The embedding is the target's and frozen, one for all positions; checkpoints of this
layout hold a copy per position.

Shapes: T tokens, A anchors, R rows, H hidden size, D draft vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill_pipe.consume.drafts.draft import POSITIONS, Chain, Draft, last_layer
from distill_pipe.consume.drafts.target_files import DraftConfig
from distill_pipe.consume.vocabulary import DraftVocabulary


class MlpSpeculatorDraft(Draft):
    """Projection, norm and head of each position. The inner size is the target's hidden size."""

    arch, recurrent = "mlp_speculator", False

    def __init__(self, config: DraftConfig, layers: Sequence[int], positions: int = POSITIONS,
                 vocabulary: DraftVocabulary | None = None) -> None:
        super().__init__(config, layers, positions, vocabulary)
        size = config.hidden_size
        embedding = nn.Embedding(config.vocab_size, size).requires_grad_(False)
        self.emb = nn.ModuleList([embedding] * positions)
        self.proj = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(positions))
        self.ln = nn.ModuleList(ScaledNorm(size) for _ in range(positions))
        self.head = nn.ModuleList(nn.Linear(size, self.draft_vocab_size, bias=False) for _ in range(positions))
        state_weight = 0.5 ** (0.5 / positions)
        self.embedding_share: float = ((1 - state_weight ** 2) * (size / 2)) ** 0.5 / state_weight

    @classmethod
    def layers_read(cls, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """The last layer."""
        return last_layer(stored, num_layers, cls.arch)

    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        """Start from the target's final state, scaled to a fixed size (`scale_input`)."""
        return _MlpChain(self, root_mean_square_norm(self.final_state(hidden)) / 2 ** 0.5)

    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        """The position's own head."""
        logits_RD: Tensor = self.head[position](states_RH)
        return logits_RD

    def take_over(self, embedding_VH: Tensor, head_DH: Tensor, norm_H: Tensor) -> None:
        """The embedding stays; every head starts as the target's."""
        self.emb[0].load_state_dict({"weight": embedding_VH})
        for head in self.head:
            head.load_state_dict({"weight": head_DH})

    def engine_config(self) -> dict[str, object]:
        """The layout of published MLP speculators. vLLM 0.32 has the class and does not register it."""
        return {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator",
                "vocab_size": self.config.vocab_size, "emb_dim": self.config.hidden_size,
                "inner_dim": self.config.hidden_size, "n_predict": self.positions, "n_candidates": 1,
                "top_k_tokens_per_head": [1] * self.positions, "tie_weights": False, "scale_input": True}


class _MlpChain:
    def __init__(self, draft: MlpSpeculatorDraft, state_AH: Tensor) -> None:
        self._draft, self._state_AH, self._steps = draft, state_AH, 0

    def step(self, next_ids_A: Tensor) -> Tensor:
        draft, k = self._draft, self._steps
        mixed_AH = draft.proj[k](self._state_AH) + draft.embedding_share * draft.emb[k](next_ids_A)
        self._state_AH, self._steps = functional.gelu(draft.ln[k](mixed_AH)), k + 1
        return self._state_AH

    def narrow(self, anchors_A: Tensor) -> None:
        self._state_AH = self._state_AH[anchors_A]


class ScaledNorm(nn.Module):
    """RMS norm with a scale and a shift."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, state_AH: Tensor) -> Tensor:
        return self.weight * root_mean_square_norm(state_AH) + self.bias


def root_mean_square_norm(state_AH: Tensor) -> Tensor:
    """The state scaled to a root mean square of 1."""
    return functional.rms_norm(state_AH, state_AH.shape[1:], eps=1e-6)
