"""The target's distribution without anything left out: its last hidden state through the final norm and the lm_head.

Exact as far as the stored state is: with a lossless codec of the engine's own type, up to the rounding of the engine's
products; a lossy codec's error goes into every logit. The price is the target's lm_head in memory and one product of
it per loss and one per gradient, chunk by chunk: the logits of `chunk_rows` rows are alive at a time, and a few arrays
of their size beside them.

Shapes: R rows, H hidden size, V vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import require_run
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.root import open_root

# Architectures whose last step is an RMS norm times its weight, and then the lm_head without a scale or a soft cap.
_PLAIN_RMS = frozenset({
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM"})


@dataclass(frozen=True, slots=True, eq=False)
class ExactTarget:
    """R rows of a target, each as the residual stream after its last layer (canonical layer N, before the final norm).

    Args:
        states_RH: `batch.hidden[N][batch.rows_R]`.
        lm_head_VH: the target's lm_head; the embedding where they are tied. Products are in its type.
        norm: the final norm; see `final_norm`. The identity for states that are stored behind it.
        chunk_rows: rows whose logits are alive at a time.

    Raises:
        UsageError: the shapes do not fit each other.
    """

    states_RH: Tensor
    lm_head_VH: Tensor
    norm: Callable[[Tensor], Tensor]
    chunk_rows: int = 64

    def __post_init__(self) -> None:
        if self.states_RH.ndim != 2 or self.lm_head_VH.ndim != 2 or self.states_RH.shape[1] != self.lm_head_VH.shape[1]:
            raise UsageError(f"target states of shape {tuple(self.states_RH.shape)} do not fit an lm_head of shape "
                             f"{tuple(self.lm_head_VH.shape)}")
        if self.chunk_rows < 1:
            raise UsageError(f"chunk_rows must be at least 1, and is {self.chunk_rows}")

    @property
    def vocab_size(self) -> int:
        return len(self.lm_head_VH)

    def __len__(self) -> int:
        return len(self.states_RH)

    def __getitem__(self, rows: slice | Tensor) -> "ExactTarget":
        """Some rows: a slice, a boolean mask, or row numbers."""
        return replace(self, states_RH=self.states_RH[rows])

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """The target's logits of some rows, `[., V]`."""
        states = self.norm(self.states_RH[rows].float()).to(self.lm_head_VH.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return functional.linear(states, self.lm_head_VH)

    def chunks(self) -> list[slice]:
        """The rows, `chunk_rows` at a time; without any row, one empty chunk."""
        return [slice(start, start + self.chunk_rows) for start in range(0, max(1, len(self)), self.chunk_rows)]


def final_norm(root: str | os.PathLike[str]) -> nn.RMSNorm:
    """The target's final norm, as the dataset holds it: float32, not trainable.

    Raises:
        UsageError: the dataset lacks its epsilon, or the target's architecture is not known to end in a plain RMS norm.
        DamageError: the dataset lacks its weight.
    """
    place = open_root(root)
    target = require_run(place).spec.target
    if target.architecture not in _PLAIN_RMS or target.final_norm_eps is None:
        raise UsageError(f"{root}: how {target.architecture} gets from its last state to logits is not known here, or "
                         "its epsilon is not stored; give ExactTarget the target's own norm as a function")
    norm = nn.RMSNorm(target.hidden_size, target.final_norm_eps).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(read_final_norm(place, target.hidden_size).copy()))
    return norm
