"""The last state on the other side of the final norm: datasets keep it before, most trainers want it behind.

An RMS norm in float32 (`x / sqrt(mean(x^2) + eps) * weight`), rounded once at the end. Some families multiply by
`1 + weight`; a target whose norm is of another kind has no epsilon in `run.json` and is refused.

Shapes: S positions, H hidden size.
"""

import torch
from torch import Tensor

from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.root import Root

# Families whose RMS norm multiplies by 1 + weight.
_ONE_PLUS_WEIGHT = ("GemmaFor", "Gemma2For", "Gemma3For", "Qwen3Next", "Qwen3_5", "Rnj1", "Step3p5")


class FinalNorm:
    """The target's final norm, as the dataset stores it.

    Raises:
        UsageError: the dataset has no final norm, or one that is not an RMS norm.
        DamageError: the stored weight is damaged.
    """

    def __init__(self, root: Root, run: Run) -> None:
        target = run.spec.target
        if target.final_norm_eps is None or root.size(FINAL_NORM) is None:
            raise UsageError(f"{root} holds no RMS norm of {target.name} ({target.architecture}), so the last state "
                             "cannot be given as the trainer wants it, behind the final norm; export for a trainer "
                             "that takes it before the norm (speculators)")
        weight_H = torch.from_numpy(read_final_norm(root, target.hidden_size).copy())
        self._eps = target.final_norm_eps
        self._weight_H = weight_H + 1 if target.architecture.startswith(_ONE_PLUS_WEIGHT) else weight_H

    def __call__(self, states_SH: Tensor) -> Tensor:
        """States behind the norm, float32."""
        wide_SH = states_SH.float()
        return wide_SH * torch.rsqrt(wide_SH.square().mean(1, keepdim=True) + self._eps) * self._weight_H
