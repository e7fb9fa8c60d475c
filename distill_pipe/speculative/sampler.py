"""Lossless verification of a chain of drafted tokens: speculative sampling as of arXiv 2211.17192 (section 2, App. A).

Token x drafted from q is accepted with probability min(1, p(x) / q(x)). At the first rejection the next token is drawn
from max(0, p - q), normalised; when all are accepted, a bonus token is drawn from p. What comes out is distributed as
the target's own text, whatever the draft is. T = 0 is the same rule with both distributions turned into their likeliest
token, which makes the text the target's greedy text.

Everything is float64: a residual is a difference of small numbers.

Shapes: K drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor


def probabilities(logits_NV: Tensor, temperature: float) -> Tensor:
    """Distributions that logits stand for at a temperature, in float64; at 0 all is on the likeliest token."""
    if temperature == 0:
        return torch.zeros(logits_NV.shape, dtype=torch.float64).scatter(-1, logits_NV.argmax(-1, keepdim=True), 1.0)
    return (logits_NV.double() / temperature).softmax(-1)


def draw(weights_V: Tensor, generator: torch.Generator) -> int:
    """One token, in proportion to non-negative weights."""
    return int(torch.multinomial(weights_V, 1, generator=generator))


def verify(drafted_ids: list[int], q_KV: Tensor, p_K1V: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """How many of the K drafted tokens are accepted, and the token that the target puts behind them.

    Args:
        drafted_ids: the tokens; token k was drawn from `q_KV[k]`.
        q_KV: what the draft drew from.
        p_K1V: what the target would draw from at the same places, and behind the last one.
        generator: random numbers of this decoding.
    """
    uniform_K = torch.rand(len(drafted_ids), generator=generator, dtype=torch.float64)
    for k, token in enumerate(drafted_ids):
        if uniform_K[k] * q_KV[k, token] >= p_K1V[k, token]:
            return k, draw((p_K1V[k] - q_KV[k]).clamp(min=0), generator)
    return len(drafted_ids), draw(p_K1V[-1], generator)
