"""Medusa heads (arXiv 2401.10774): every position is drafted at once from the target's final state.

Head k is a residual block and a head matrix of its own. No token that was sampled or drafted enters, so a head knows
only the *average* continuation of the state; that is what the architecture gives up for one parallel step. The blocks
start as the identity and the matrices as the target's head.

Shapes: T tokens, A anchors, R rows, H hidden size, D draft vocabulary.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from distill_pipe.consume.drafts.draft import POSITIONS, Chain, Draft, last_layer
from distill_pipe.consume.drafts.target_files import DraftConfig
from distill_pipe.consume.vocabulary import DraftVocabulary


class MedusaDraft(Draft):
    """One residual block and one head matrix per position."""

    arch, recurrent = "medusa", False

    def __init__(self, config: DraftConfig, layers: Sequence[int], positions: int = POSITIONS,
                 vocabulary: DraftVocabulary | None = None) -> None:
        super().__init__(config, layers, positions, vocabulary)
        self.blocks = nn.ModuleList(ResidualBlock(config.hidden_size) for _ in range(positions))
        self.lm_heads = nn.ModuleList(nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False)
                                      for _ in range(positions))

    @classmethod
    def layers_read(cls, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """The last layer."""
        return last_layer(stored, num_layers, cls.arch)

    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        """Start from the target's final state, and stay there."""
        return _MedusaChain(self, self.final_state(hidden))

    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        """The position's own head."""
        logits_RD: Tensor = self.lm_heads[position](states_RH)
        return logits_RD

    def take_over(self, embedding_VH: Tensor, head_DH: Tensor, norm_H: Tensor) -> None:
        """Every head starts as the target's."""
        for head in self.lm_heads:
            head.load_state_dict({"weight": head_DH})

    def engine_config(self) -> dict[str, object]:
        """vLLM's `MedusaModel`. It names a truncated vocabulary `token_map`."""
        return {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": self.config.hidden_size,
                "vocab_size": self.config.vocab_size, "truncated_vocab_size": self.draft_vocab_size,
                "num_heads": self.positions, "num_hidden_layers": 1, "medusa_fc_bias": True}


class _MedusaChain:
    def __init__(self, draft: MedusaDraft, state_AH: Tensor) -> None:
        self._draft, self._state_AH, self._steps = draft, state_AH, 0

    def step(self, next_ids_A: Tensor) -> Tensor:
        self._steps += 1
        state_AH: Tensor = self._draft.blocks[self._steps - 1](self._state_AH)
        return state_AH

    def narrow(self, anchors_A: Tensor) -> None:
        self._state_AH = self._state_AH[anchors_A]


class ResidualBlock(nn.Module):
    """`x + silu(W x + b)`, at first the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        linear = nn.Linear(size, size)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.layers = nn.ModuleList([linear])

    def forward(self, state_AH: Tensor) -> Tensor:
        out_AH: Tensor = state_AH + functional.silu(self.layers[0](state_AH))
        return out_AH
