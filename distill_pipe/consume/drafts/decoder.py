"""One Llama decoder layer, run as a chain of drafting steps.

The first step is plain causal attention over each sequence. A later step starts at an anchor t from the step before it
and stands one position further; it attends to the first step's keys up to t, and to those of the anchor's own later
steps. That is what an engine's key-value cache holds when it drafts, and the training-time test of EAGLE-3
(arXiv 2503.01840 section 3.2). The trade-off for brevity: attention runs one sequence at a time, which many short
sequences on a GPU would want fused, and later steps hold `anchors x tokens` scores of a sequence.

Shapes: T tokens, A anchors, B sequences, H hidden size, I attention input, N heads, E head size, L later steps.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill_pipe.consume.drafts.target_files import DraftConfig


class Memory:
    """Keys and values of a chain: those of the first step at every token, and one pair per anchor and later step."""

    def __init__(self, position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> None:
        self._edges_B1 = cu_seqlens_B1.to(position_ids_T.device, torch.int64)
        self._anchors_A = torch.arange(len(position_ids_T), device=position_ids_T.device)
        self._first: tuple[Tensor, Tensor] | None = None
        self._later: list[tuple[Tensor, Tensor]] = []

    def narrow(self, anchors_A: Tensor) -> None:
        """Keep some anchors, given as token indices in ascending order."""
        kept_A = torch.searchsorted(self._anchors_A, anchors_A)
        self._anchors_A = anchors_A
        self._later = [(k_NAE[:, kept_A], v_NAE[:, kept_A]) for k_NAE, v_NAE in self._later]

    def attend(self, q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor) -> Tensor:
        """Remember a step's keys and values, and attend to everything that its anchors may see: `[N, A, E]`."""
        if self._first is None:
            self._first = k_NAE, v_NAE
            spans = [slice(*edges) for edges in pairwise(self._edges_B1.tolist())]
            return torch.cat([functional.scaled_dot_product_attention(q_NAE[:, s], k_NAE[:, s], v_NAE[:, s],
                                                                      is_causal=True) for s in spans], 1)
        self._later.append((k_NAE, v_NAE))
        anchor_edges = torch.searchsorted(self._anchors_A, self._edges_B1).tolist()
        return torch.cat([self._later_step(self._first, q_NAE, slice(*tokens), slice(*anchors))
                          for tokens, anchors in zip(pairwise(self._edges_B1.tolist()), pairwise(anchor_edges),
                                                     strict=True)], 1)

    def _later_step(self, first: tuple[Tensor, Tensor], q_NAE: Tensor, tokens: slice, anchors: slice) -> Tensor:
        """One sequence: its first-step tokens, and those of its anchors that are left."""
        k_NTE, v_NTE = (part[:, tokens] for part in first)
        q_NAE = q_NAE[:, anchors] / q_NAE.shape[-1] ** 0.5
        tokens_T = torch.arange(tokens.start, tokens.stop, device=q_NAE.device)
        hidden_AT = tokens_T > self._anchors_A[anchors, None]
        scores_NAT = (q_NAE @ k_NTE.mT).masked_fill(hidden_AT, -torch.inf)
        own_NAL = torch.stack([(q_NAE * k_NAE[:, anchors]).sum(-1) for k_NAE, _ in self._later], -1)
        shares_NAX = torch.cat([scores_NAT, own_NAL], -1).softmax(-1)
        out_NAE: Tensor = shares_NAX[..., :k_NTE.shape[1]] @ v_NTE
        for step, (_, v_NAE) in enumerate(self._later):
            out_NAE = out_NAE + shares_NAX[..., k_NTE.shape[1] + step, None] * v_NAE[:, anchors]
        return out_NAE


class Attention(nn.Module):
    """Rotary attention over what a chain remembers."""

    def __init__(self, config: DraftConfig, inputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.kv_heads, config.head_size
        self.q_proj = nn.Linear(inputs, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)
        self.theta = config.theta

    def forward(self, inputs_AI: Tensor, position_ids_A: Tensor, memory: Memory) -> Tensor:
        turns = _turns(position_ids_A, self.size, self.theta)
        q_NAE = _rotate(self.q_proj(inputs_AI).unflatten(1, (self.heads, self.size)).transpose(0, 1), turns)
        k_NAE = _rotate(self.k_proj(inputs_AI).unflatten(1, (self.kv_heads, self.size)).transpose(0, 1), turns)
        v_NAE = self.v_proj(inputs_AI).unflatten(1, (self.kv_heads, self.size)).transpose(0, 1)
        repeats = self.heads // self.kv_heads
        out_NAE = memory.attend(q_NAE, k_NAE.repeat_interleave(repeats, 0), v_NAE.repeat_interleave(repeats, 0))
        mixed_AH: Tensor = self.o_proj(out_NAE.transpose(0, 1).flatten(1))
        return mixed_AH


class SwiGlu(nn.Module):
    """The gated MLP of a Llama layer."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states_AH: Tensor) -> Tensor:
        out_AH: Tensor = self.down_proj(functional.silu(self.gate_proj(states_AH)) * self.up_proj(states_AH))
        return out_AH


def _turns(position_ids_A: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, `[A, E]` each."""
    speeds_E = theta ** (-torch.arange(0, size, 2, device=position_ids_A.device) / size)
    angles_AE = (position_ids_A[:, None] * speeds_E).repeat(1, 2)
    return angles_AE.cos(), angles_AE.sin()


def _rotate(values_NAE: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    first, second = values_NAE.chunk(2, dim=-1)
    return values_NAE * turns[0] + torch.cat([-second, first], -1) * turns[1]
