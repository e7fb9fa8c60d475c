"""A one-layer EAGLE-3 draft (arXiv 2503.01840): its first drafting step, without training-time test.

Alignment. After step t the target has the hidden state g_t and has sampled token t+1. The draft pairs g_t with the
embedding of token **t+1** and predicts token **t+2**. So its output at index t is compared with the target's row that
supervises position **t+1**:

    index                       t            t+1
    draft reads                 g_t, x_{t+1}
    draft output at t           q(x_{t+2})
    target row to compare with               p(x_{t+2})

`drafted_rows` does this pairing. The row of a sequence's first position has no draft output and is left out. Weights
are named as in released EAGLE-3 drafts. The trade-off for brevity: attention runs one sequence at a time, which many
short sequences on a GPU would want fused.

Shapes: T tokens, B sequences, R rows, H hidden size, N heads, D head size, V vocabulary.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from distill_pipe.consume.reader import Batch
from distill_pipe.errors import UsageError


class RopeParameters(msgspec.Struct, frozen=True):
    """`rope_parameters` of a target's config.json."""

    rope_theta: float = 10_000.0


class DraftConfig(msgspec.Struct, frozen=True):
    """What the draft takes over from the target's config.json; other fields there are ignored."""

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: RopeParameters = RopeParameters()

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def theta(self) -> float:
        return self.rope_theta or self.rope_parameters.rope_theta


class Eagle3Draft(nn.Module):
    """Fuses auxiliary states, runs one decoder layer over them and the next tokens, and shares the target's tables.

    Each auxiliary state is normalised before it is fused (`fc_norm`), because layers differ in size by orders of
    magnitude and single channels stick out by hundreds. The fusion starts as the deepest state alone: what the target
    is about to say at t is a better start than noise.

    Args:
        config: sizes, from the target.
        layers: canonical layers of the target that are fused, shallow to deep.
        train_head: fit `lm_head` too; the embedding is always frozen.
    """

    def __init__(self, config: DraftConfig, layers: Sequence[int], *, train_head: bool = False) -> None:
        super().__init__()
        self.config, self.layers = config, tuple(layers)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size).requires_grad_(False)
        self.fc_norm = nn.ModuleList(nn.RMSNorm(size, config.rms_norm_eps) for _ in self.layers)
        self.fc = nn.Linear(len(self.layers) * size, size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False).requires_grad_(train_head)
        with torch.no_grad():
            self.fc.weight.zero_()[:, -size:] = torch.eye(size)

    def forward(self, batch: Batch) -> Tensor:
        """Draft states `[T, H]`: index t predicts token t+2. The last two of a sequence are compared with nothing."""
        embeds_TH = self.embed_tokens(batch.token_ids_T.roll(-1))
        normed = [norm(batch.hidden[n].to(embeds_TH.dtype)) for n, norm in zip(self.layers, self.fc_norm, strict=True)]
        fused_TH = self.fc(torch.cat(normed, 1))
        states_TH: Tensor = self.norm(self.midlayer(embeds_TH, fused_TH, batch.position_ids_T, batch.cu_seqlens_B1))
        return states_TH

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def logits(self, states_RH: Tensor) -> Tensor:
        """Logits `[R, V]` of some draft states."""
        logits_RV: Tensor = self.lm_head(states_RH)
        return logits_RV

    def start_from_target(self, folder: Path) -> None:
        """Take over the target's embedding, lm_head (the embedding where they are tied) and final norm.

        Raises:
            UsageError: the folder lacks the embedding or the norm.
        """
        embedding, head, norm = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
        weights = read_weights(folder, (embedding, head, norm))
        absent = {embedding, norm} - set(weights)
        if absent:
            raise UsageError(f"{folder} holds no weight named {' or '.join(sorted(absent))}")
        with torch.no_grad():
            self.embed_tokens.weight.copy_(weights[embedding])
            self.norm.weight.copy_(weights[norm])
            if head not in weights and not self.lm_head.weight.requires_grad:
                self.lm_head.weight = self.embed_tokens.weight
            else:
                self.lm_head.weight.copy_(weights.get(head, weights[embedding]))


class Eagle3Layer(nn.Module):
    """A Llama decoder layer whose attention reads the token and the fused state side by side."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGlu(config)

    def forward(self, embeds_TH: Tensor, fused_TH: Tensor, position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
        both_TH2 = torch.cat([self.input_layernorm(embeds_TH), self.hidden_norm(fused_TH)], 1)
        states_TH = fused_TH + self.self_attn(both_TH2, position_ids_T, cu_seqlens_B1)
        out_TH: Tensor = states_TH + self.mlp(self.post_attention_layernorm(states_TH))
        return out_TH


class Attention(nn.Module):
    """Causal attention with rotary positions, within each sequence."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.kv_heads, config.head_size
        self.q_proj = nn.Linear(2 * config.hidden_size, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)
        self.theta = config.theta

    def forward(self, both_TH2: Tensor, position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Tensor:
        turns = _turns(position_ids_T, self.size, self.theta)
        q_NTD = _rotate(self.q_proj(both_TH2).unflatten(1, (self.heads, self.size)).transpose(0, 1), turns)
        k_NTD = _rotate(self.k_proj(both_TH2).unflatten(1, (self.kv_heads, self.size)).transpose(0, 1), turns)
        v_NTD = self.v_proj(both_TH2).unflatten(1, (self.kv_heads, self.size)).transpose(0, 1)
        repeats = self.heads // self.kv_heads
        k_NTD, v_NTD = k_NTD.repeat_interleave(repeats, 0), v_NTD.repeat_interleave(repeats, 0)
        spans = [slice(*edges) for edges in pairwise(cu_seqlens_B1.tolist())]
        out_NTD = torch.cat([functional.scaled_dot_product_attention(q_NTD[:, s], k_NTD[:, s], v_NTD[:, s],
                                                                     is_causal=True) for s in spans], 1)
        mixed_TH: Tensor = self.o_proj(out_NTD.transpose(0, 1).flatten(1))
        return mixed_TH


class SwiGlu(nn.Module):
    """The gated MLP of a Llama layer."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states_TH: Tensor) -> Tensor:
        out_TH: Tensor = self.down_proj(functional.silu(self.gate_proj(states_TH)) * self.up_proj(states_TH))
        return out_TH


def drafted_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Pairs of draft output and target row: indices into T, and the numbers of the rows they are compared with."""
    rows_R = torch.arange(len(batch.rows_R), device=batch.rows_R.device)
    drafted_R = batch.position_ids_T[batch.rows_R] > 0
    return batch.rows_R[drafted_R] - 1, rows_R[drafted_R]


def read_config(folder: Path) -> DraftConfig:
    """The sizes of a target, from its config.json.

    Raises:
        UsageError: there is none, or it lacks a field.
    """
    try:
        return msgspec.json.decode((folder / "config.json").read_bytes(), type=DraftConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder}/config.json cannot be used: {error}") from error


def read_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of the named weights that a target folder holds, from one safetensors file or an indexed set of them.

    Raises:
        UsageError: the folder holds no safetensors weights.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        files = {n: f for n, f in json.loads(index.read_bytes())["weight_map"].items() if n in names}
    elif single.exists():
        files = dict.fromkeys(names, single.name)
    else:
        raise UsageError(f"{folder} holds neither {single.name} nor {index.name}")
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as weights:
            stored = set(weights.keys())
            found |= {n: weights.get_tensor(n) for n, f in files.items() if f == file and n in stored}
    return found


def _turns(position_ids_T: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, `[T, D]` each."""
    speeds_D = theta ** (-torch.arange(0, size, 2, device=position_ids_T.device) / size)
    angles_TD = (position_ids_T[:, None] * speeds_D).repeat(1, 2)
    return angles_TD.cos(), angles_TD.sin()


def _rotate(values_NTD: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    first, second = values_NTD.chunk(2, dim=-1)
    return values_NTD * turns[0] + torch.cat([-second, first], -1) * turns[1]
