"""How to draw the tail's samples: what the choice makes of the error of the acceptance rate, at the same M.

The tail contributes sum_{x in tail} p(x) min(1, q(x) / p(x)) to alpha. Four ways to estimate it from M tokens, each
unbiased: systematic in the order of token ids (shipped), systematic in the order of probability (needs the tail
sorted), independent draws, and priority sampling, which draws without replacement (Duffield, Lund and Thorup 2007) and
weighs each token by max(p, threshold), so that a row stores the threshold too. Rows and drafts are those of bench_head.

Shapes: R rows, M tail samples, D draws, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from format_data import captured, chunks, print_table
from torch import Tensor

from distill_pipe.produce.head import HeadReducer, row_uniforms
from distill_pipe.store.spec import CaptureSpec

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

HEAD, DRAWS = 32, 8

BY_PROBABILITY = "systematic, by probability"

# Tail probabilities `[R, V]` (0 in the head), accepted shares min(1, q / p) `[R, V]`, M, draw -> estimates `[R]`.
Draw = Callable[[Tensor, Tensor, int, int], Tensor]


def systematic(tail_RV: Tensor, accepted_RV: Tensor, samples: int, draw: int) -> Tensor:
    cumulative_RV = tail_RV.cumsum(1)
    uniform_R1 = torch.from_numpy(row_uniforms(draw, 0, np.arange(len(tail_RV)))).double()[:, None]
    points_RM = (uniform_R1 + torch.arange(samples)) / samples * cumulative_RV[:, -1:]
    chosen_RM = torch.searchsorted(cumulative_RV, points_RM, right=True).clamp(max=tail_RV.shape[1] - 1)
    return cumulative_RV[:, -1] * accepted_RV.gather(1, chosen_RM).mean(1)


def independent(tail_RV: Tensor, accepted_RV: Tensor, samples: int, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    chosen_RM = torch.multinomial(tail_RV, samples, replacement=True, generator=generator)
    return tail_RV.sum(1) * accepted_RV.gather(1, chosen_RM).mean(1)


def priority(tail_RV: Tensor, accepted_RV: Tensor, samples: int, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    uniform_RV = torch.rand(tail_RV.shape, generator=generator, dtype=torch.float64).clamp(min=1e-12)
    best = (tail_RV / uniform_RV).topk(samples + 1, dim=1)
    weight_RM = torch.maximum(tail_RV.gather(1, best.indices[:, :-1]), best.values[:, -1:])
    return (weight_RM * accepted_RV.gather(1, best.indices[:, :-1])).sum(1)


METHODS: dict[str, Draw] = {
    "systematic, by id (shipped)": systematic, BY_PROBABILITY: systematic, "independent draws": independent,
    "priority sampling, without replacement": priority,
}


@pytest.mark.timeout(1800)
def test_systematic_samples_of_the_tail_against_three_other_ways(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    data = captured(tmp_path_factory)
    logits_RV = data.logits(data.traces[::20])
    noise = torch.Generator().manual_seed(0)
    errors: dict[tuple[str, int], list[Tensor]] = {}
    shipped: list[Tensor] = []
    for rows in chunks(len(logits_RV)):
        p_RV = logits_RV[rows].double().softmax(1)
        q_RV = (0.9 * logits_RV[rows] + 0.8 * torch.randn(p_RV.shape, generator=noise)).double().softmax(1)
        accepted_RV = (q_RV / p_RV).clamp(max=1)
        tail_RV = p_RV.scatter(1, p_RV.topk(HEAD, dim=1).indices, 0.0)
        truth_R = (tail_RV * accepted_RV).sum(1)
        shipped.append(as_shipped(logits_RV[rows], accepted_RV) - systematic(tail_RV, accepted_RV, 8, 0))
        order_RV = tail_RV.argsort(1, descending=True)
        for name, method in METHODS.items():
            given = (tail_RV, accepted_RV)
            if name == BY_PROBABILITY:
                given = (tail_RV.gather(1, order_RV), accepted_RV.gather(1, order_RV))
            for samples in (4, 8, 16):
                drawn_DR = torch.stack([method(*given, samples, d) for d in range(DRAWS)])
                errors.setdefault((name, samples), []).append(drawn_DR - truth_R)
    rows = []
    for (name, samples), parts in errors.items():
        error_DR = torch.cat(parts, 1)
        spread = float(error_DR.mean(0).std() / error_DR.shape[1]**0.5)
        rows.append((name, samples, f"{error_DR.mean():+.6f}", f"{spread:.6f}",
                     f"{error_DR.square().mean().sqrt():.5f}", f"{error_DR.abs().mean():.5f}"))
        assert abs(float(error_DR.mean())) <= 4 * spread
    print_table(f"Tail samples: {len(logits_RV)} rows, K={HEAD}, {DRAWS} draws each",
                ("drawn", "M", "bias of alpha", "standard error", "RMS error", "mean abs. error"), rows)
    # The code measured here in float64 is the one that is shipped, but for tokens on a border.
    assert float((torch.cat(shipped).abs() < 1e-4).double().mean()) >= 0.99


def as_shipped(logits_RV: Tensor, accepted_RV: Tensor) -> Tensor:
    uniform_R = torch.from_numpy(row_uniforms(0, 0, np.arange(len(logits_RV))))
    kept = HeadReducer(CaptureSpec(top_k=HEAD, tail_samples=8)).rows(
        logits_RV, uniform_R, torch.full((len(logits_RV),), -1))
    return kept.tail_mass_R.double() * accepted_RV.gather(1, kept.tail_ids_RM.long()).mean(1)
